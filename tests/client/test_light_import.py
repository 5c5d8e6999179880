"""The client stays light."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "ase", "ray", "deepspeed", "scipy", "safetensors", "vesin", "matplotlib", "pydantic")


def test_importing_the_client_imports_nothing_heavy() -> None:
    code = (
        "import sys, equipot.client, equipot.client.cli\n"
        f"print([name for name in {HEAVY} if name in sys.modules])\n"
        "assert equipot.client.Client('localhost:1')\n"
        "assert 'ase' not in sys.modules\n"
        "assert equipot.client.EquipotCalculator and 'ase' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_without_ase_the_calculator_says_what_to_install() -> None:
    code = "import sys\nsys.modules['ase'] = None\nimport equipot.client\nequipot.client.EquipotCalculator\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "pip install 'equipot[ase]'" in done.stderr


def test_without_ase_predict_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['ase'] = None\n"
        "from equipot.cli.main import main\n"
        "sys.exit(main(['predict', 'water.xyz']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: `equipot predict` needs ase: pip install 'equipot[ase]'"]
