"""What a training run is made of, as a TOML file checked before anything starts. Knows no torch.

A recipe is read with :func:`load_recipe`; every field carries its meaning, unit and default. Relative paths
in a recipe are relative to the directory in which the command is run.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from equipot.model.config import MessageForm
from equipot.train.errors import TrainError
from equipot.train.scaling.controls.names import ARCHITECTURES as CONTROLS
from equipot.train.sections import Section, explain, parse_bytes, read_toml

# Keys that people look for and that are deliberately absent: the answer is better than "unknown key".
_ELSEWHERE = {
    "zero.tensor_parallel": "DeepSpeed's tensor parallelism gives wrong gradients for conservative forces, "
    "and is not offered in training. zero.stage = 2 or 3 divides the memory instead",
    "zero.cpu_offload": 'it is called zero.offload_optimizer = "cpu"',
    "model.elements": "elements are read from the training split",
    "model.mean_neighbors": "the mean number of neighbours is computed from the training split",
}


LEAST_IN_FILES = 2**20
"""Bytes: of what is offloaded to NVMe, a rank's part of a weight that is smaller stays in memory."""


LARGEST_BUCKET = 50_000_000
"""Elements per communication bucket: DeepSpeed's own 5e8 reserves gigabytes whatever the model's size."""


MOST_GATHERED = 4 * LARGEST_BUCKET
"""Elements that stay gathered on a rank at stage 3, besides those in use, to be used again."""


class RecipeError(TrainError):
    """A recipe that cannot be run: the message names the key, the value and the remedy."""


class DataSection(Section):
    """[data]: what is trained on: stores, split here, or a mix, which is split already."""

    stores: tuple[Path, ...] = Field(
        default=(),
        description="packed stores made by `equipot data import`; several are trained on together",
    )
    mix: Path | None = Field(
        default=None, description="a mix made by `equipot data mix`, in the place of stores"
    )
    store_root: Path | None = Field(
        default=None, description="folder that holds the mix's stores, if they were moved"
    )
    memory: Literal["map", "ray"] = Field(
        default="map",
        description="where structures are read from: mapped files, or the memory and local disks of a Ray "
        "cluster's nodes, for data larger than one node's memory",
    )
    subset: float | str = Field(
        default=1.0,
        description='how much of the training split: a fraction in (0, 1], or bytes as "120 GB"; smaller '
        "subsets lie inside larger ones, validation and test stay the same",
    )
    references: Literal["per-level", "shared"] = Field(
        default="per-level",
        description="reference energies by element and level of theory; shared is a control of the scaling "
        "study: one of each element for all levels",
    )
    fractions: tuple[float, float, float] | None = Field(
        default=None,
        description="shares of training, validation and test; they add up to 1; 0.8, 0.1, 0.1 by default",
    )
    seed: int | None = Field(
        default=None, ge=0, description="seed of the split, 0 by default; groups of frames are never divided"
    )

    @field_validator("subset", mode="before")
    @classmethod
    def _fraction_or_bytes(cls, value: object) -> object:
        if isinstance(value, str):
            parse_bytes(value)
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(f'{value!r}: give a fraction above 0, up to 1, or bytes as "120 GB"')
        return value

    @model_validator(mode="after")
    def _stores_or_a_mix(self) -> DataSection:
        if bool(self.stores) == (self.mix is not None):
            raise ValueError(
                'give either data.stores = ["…"], as made by `equipot data import`, or data.mix = "…", as '
                "made by `equipot data mix`"
            )
        for name in ("fractions", "seed"):
            if self.mix is not None and getattr(self, name) is not None:
                raise ValueError(f"{name} is the mix's own: remove it, or make another mix with it")
        if self.mix is None and self.store_root is not None:
            raise ValueError("store_root is for a mix whose stores were moved; with stores give their paths")
        shares = self.fractions
        if shares and (min(shares) < 0 or abs(sum(shares) - 1) > 1e-6 or shares[0] == 0):
            raise ValueError(
                f"fractions = {list(shares)} must be non-negative, add up to 1 and train on something"
            )
        return self


class ModelSection(Section):
    """[model]: the network; elements, charges and mean neighbours come from the training split."""

    architecture: Literal["egnn", "moments", "transformer", "gcn", "gat"] = Field(
        default="egnn",
        description="the kind of network: egnn, or moments, which takes less compute for the same error; "
        "the others are controls of the scaling study, for zero.stage ≤ 2, and cannot be exported",
    )
    width: int = Field(
        default=128, ge=1, le=65536, description="channels per atom; parameters grow as width²"
    )
    layers: int = Field(default=3, ge=1, le=64, description="message-passing layers")
    cutoff: float = Field(default=5.0, gt=0, le=20, description="radius of interaction, Å")
    radial: int = Field(default=16, ge=1, le=512, description="radial basis functions")
    forces: Literal["conservative", "direct", "invariant"] = Field(
        default="conservative",
        description="−∂E/∂positions, or a head of its own (cheaper, no stress); invariant is a control of "
        "the scaling study: forces that do not turn with the structure",
    )
    inputs: Literal["invariant", "raw"] = Field(
        default="invariant",
        description="raw is a control of the scaling study: coordinates as features, and no symmetry",
    )
    residual: bool | Literal["initial"] = Field(
        default=True,
        description="layers add to their input; initial: and to the embeddings, for deep stacks (GCNII)",
    )
    normalisation: Literal["layer", "none"] = Field(
        default="layer", description="layer norm of node features"
    )
    messages: MessageForm | tuple[MessageForm, ...] = Field(
        default="fast",
        description="evaluation orders of one function, a word for all layers or a list of one for each: "
        "fast holds a fifth of the activations of plain, the slow reference; balanced and lean hold less and "
        "take longer; split holds most of them",
    )

    @field_validator("messages", mode="before")
    @classmethod
    def _known_forms(cls, value: object) -> object:
        for word in value if isinstance(value, list | tuple) else [value]:
            if word not in get_args(MessageForm):
                known = ", ".join(get_args(MessageForm))
                raise ValueError(
                    f"{word!r} is none of {known}; give one of them, or a list of one for each layer"
                )
        return value

    @model_validator(mode="after")
    def _forms_are_the_egnns(self) -> Self:
        if self.architecture != "egnn" and self.messages != "fast":
            raise ValueError(
                f"messages = {self.messages!r} are orders of evaluation of the egnn; remove the key, "
                f"{self.architecture} has one"
            )
        if self.inputs == "raw" and self.forces == "conservative":
            raise ValueError(
                'inputs = "raw" needs forces = "direct" or "invariant": its energies depend on coordinates '
                "themselves, which conservative forces here leave out"
            )
        return self

    @model_validator(mode="after")
    def _one_form_for_each_layer(self) -> Self:
        if isinstance(self.messages, tuple) and len(self.messages) != self.layers:
            raise ValueError(
                f"messages lists {len(self.messages)} words for layers = {self.layers}; give one word for "
                "all layers, or a list of one for each"
            )
        return self


class BatchSection(Section):
    """[batch]: how many structures make a step."""

    structures: int = Field(
        default=32,
        ge=1,
        description="structures per optimizer step, over all ranks and micro-batches together",
    )
    accumulation: int = Field(
        default=1, ge=1, description="micro-batches per step and rank: less memory at the same result"
    )
    max_edges: int | None = Field(
        default=None,
        ge=1,
        description="most edges and atoms together in a micro-batch of a rank; a step that has more is "
        "computed in more micro-batches, with the same result: bounds the memory whatever the sizes",
    )
    cache_mib: int = Field(
        default=512, ge=0, description="memory per rank for keeping neighbour lists between epochs, MiB"
    )
    workers: int = Field(
        default=1,
        ge=0,
        le=64,
        description="threads per rank that make the next batches; more for fast GPUs and large structures; 0 "
        "makes each batch when it is due, which is quickest for small molecules on CPUs",
    )


class OptimizerSection(Section):
    """[optimizer]: AdamW with linear warm-up, then a cosine down to a fraction of the peak rate."""

    learning_rate: float = Field(
        default=1e-3, gt=0, le=1, description="peak learning rate, reached after warm-up"
    )
    final_fraction: float = Field(
        default=0.01, ge=0, le=1, description="learning rate at the last step, as a fraction of the peak"
    )
    warmup_steps: int = Field(default=100, ge=0, description="steps of linear warm-up from zero")
    weight_decay: float = Field(
        default=0.01, ge=0, description="decoupled weight decay of matrices (not of biases and norms)"
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW's decay rates of its moments")
    epochs: int | None = Field(default=None, ge=0, description="length of training in epochs")
    steps: int | None = Field(
        default=None, ge=0, description="length in optimizer steps; with epochs too, what ends first"
    )
    clip: float = Field(
        default=10.0, ge=0, description="the gradient's norm is clipped to this; 0 leaves it as it is"
    )

    @model_validator(mode="after")
    def _has_a_length(self) -> OptimizerSection:
        if self.epochs is None and self.steps is None:
            raise ValueError("the length of training is missing: give epochs, or steps")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {list(self.betas)} must each lie in [0, 1)")
        return self


class LossSection(Section):
    """[loss]: weighted sum of means over the whole global batch; absent labels count for nothing."""

    kind: Literal["huber", "mse", "mae"] = Field(default="huber", description="penalty of one residual")
    huber_delta: float = Field(
        default=0.05, gt=0, description="where huber turns from square to linear: eV/atom, eV/Å, eV/Å³"
    )
    energy: float = Field(default=1.0, ge=0, description="weight of the energy per atom, eV/atom")
    forces: float = Field(default=10.0, ge=0, description="weight of the force components, eV/Å")
    stress: float = Field(
        default=0.0, ge=0, description="weight of the stress components, eV/Å³; needs conservative forces"
    )

    @model_validator(mode="after")
    def _something_to_learn(self) -> LossSection:
        if self.energy + self.forces + self.stress == 0:
            raise ValueError("all of energy, forces and stress weigh 0: give at least one a positive weight")
        return self


class ZeroSection(Section):
    """[zero]: what DeepSpeed's ZeRO divides among the ranks, and what it keeps elsewhere meanwhile."""

    stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="0 nothing, 1 optimizer states, 2 gradients too, 3 weights too",
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field(
        default="none",
        description="where optimizer states and fp32 weights live: with the device, in the host's memory "
        "(stage 1 to 3), or in files (stage 3)",
    )
    offload_parameters: Literal["none", "cpu"] = Field(
        default="none",
        description="where the divided weights live between uses (stage 3); in files they would silently be "
        "rounded to bf16 by DeepSpeed",
    )
    nvme_path: Path | None = Field(
        default=None, description='directory for what is offloaded to "nvme", on a disk of this machine'
    )


class EmaSection(Section):
    """[ema]: an exponential moving average of the weights, used for validation and export."""

    decay: float = Field(
        default=0.999,
        ge=0,
        lt=1,
        description="weight of the past; 0 keeps no average and saves its 4 bytes a parameter",
    )


class ValidationSection(Section):
    """[validation]: how often the validation split is evaluated, and when that ends training."""

    every_epochs: int | None = Field(default=1, ge=1, description="epochs between two validations")
    every_steps: int | None = Field(default=None, ge=1, description="steps between two validations, besides")
    patience: int | None = Field(
        default=None, ge=1, description="stop after so many validations without improvement; absent: never"
    )


class CheckpointSection(Section):
    """[checkpoint]: when the run is saved. The best one and the one at the end are always kept."""

    every_epochs: int | None = Field(default=1, ge=1, description="epochs between two checkpoints")
    every_steps: int | None = Field(default=None, ge=1, description="steps between two checkpoints, besides")
    keep: int = Field(default=2, ge=1, description="how many of the newest are kept, besides the best")
    keep_every_steps: int | None = Field(
        default=None, ge=1, description="checkpoints at multiples of this are kept for ever, besides"
    )
    asynchronous: bool = Field(
        default=True,
        description="training goes on while a copy of the state in the host's memory is written: 16 bytes a "
        "parameter, divided among the ranks; false: no copy, and training waits for the disk",
    )
    when_busy: Literal["wait", "skip"] = Field(
        default="wait",
        description="what a checkpoint does that is due while one is still being written; the best is always "
        "waited for",
    )


class WatchSection(Section):
    """[watch]: what is done about steps that go wrong, and where else the run is shown.

    To skip a step is to leave weights, moments and average as they are and to go on with the next batch. To
    roll back is to take up those of the last checkpoint, and to go on behind the batch that went wrong: those
    between would lead there again.
    """

    not_finite: Literal["stop", "skip", "rollback"] = Field(
        default="stop", description="what is done when a loss or gradient is not a finite number"
    )
    spike: Literal["report", "stop", "skip", "rollback"] = Field(
        default="report", description="what is done when the loss of a step is far above those before"
    )
    spike_factor: float = Field(
        default=10.0, gt=1, description="how many times the median of the last losses is far above"
    )
    window: int = Field(
        default=100,
        ge=5,
        le=10_000,
        description="how many losses the median is taken of; there is no spike before half as many",
    )
    most: int = Field(
        default=20, ge=0, description="steps that are skipped or rolled back before the run stops"
    )
    wandb: Literal["off", "offline", "online"] = Field(
        default="off",
        description="Weights & Biases, besides TensorBoard: offline writes files for `wandb sync`, and needs "
        "no network",
    )
    wandb_project: str = Field(default="equipot", description="the project that W&B shows the run in")


class FinetuneSection(Section):
    """[finetune]: begin from a bundle's weights; architecture and cutoff are then the bundle's."""

    bundle: Path = Field(description="a bundle written by `equipot export`")
    weights: Literal["all", "heads"] = Field(
        default="all",
        description="what is trained: all weights, or the heads of energies and direct forces alone, which "
        "leaves the rest as it is to the last bit",
    )


class Recipe(Section):
    """One training run. Top-level keys stand before the first [section] of the file."""

    seed: int = Field(
        default=0, ge=0, description="seed of the initial weights and of the order of structures"
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="of the network's arithmetic; master weights are always fp32"
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="recompute each layer in the backward pass: less memory, about a quarter slower; pays "
        "with plain or split messages and direct forces, or zero.stage = 3",
    )
    data: DataSection
    model: ModelSection = ModelSection()
    finetune: FinetuneSection | None = Field(default=None, description="begin from a bundle's weights")
    batch: BatchSection = BatchSection()
    optimizer: OptimizerSection
    loss: LossSection = LossSection()
    zero: ZeroSection = ZeroSection()
    ema: EmaSection = EmaSection()
    validation: ValidationSection = ValidationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    watch: WatchSection = WatchSection()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe, apply ``section.key=value`` overrides and check it.

    Raises:
        RecipeError: no such file, not TOML, an unknown key or a value out of range; each named, on one line.
    """
    try:
        values = read_toml(Path(path), "recipe", overrides)
    except ValueError as error:
        raise RecipeError(str(error)) from None
    return parse_recipe(values, str(path))


def parse_recipe(values: Mapping[str, object], source: str) -> Recipe:
    """Check a recipe given as plain values; `source` is how error messages call it."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{source}: {explain(error, Recipe, 'recipe', _ELSEWHERE)}") from None


def check_combination(recipe: Recipe, ranks: int) -> None:
    """Refuse what cannot work together, with the reason and the nearest thing that does.

    Raises:
        RecipeError: naming the keys in conflict.
    """
    conservative = recipe.model.forces == "conservative"
    if recipe.precision == "bf16" and recipe.zero.stage == 0:
        raise RecipeError(
            'precision = "bf16" cannot be combined with zero.stage = 0, which keeps no fp32 master weights. '
            "Nearest: zero.stage = 1 (the same result, less memory)"
        )
    if recipe.zero.stage == 3 and recipe.model.architecture in CONTROLS:
        raise RecipeError(
            f'model.architecture = "{recipe.model.architecture}" cannot be combined with zero.stage = 3, '
            "which differentiates forwards; controls of the scaling study do not. Nearest: zero.stage = 2"
        )
    _check_offloading(recipe, ranks)
    if recipe.watch.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise RecipeError(
            f'watch.wandb = "{recipe.watch.wandb}" needs a package that is not installed: pip install '
            '"equipot[wandb]", or watch.wandb = "off"'
        )
    if recipe.loss.stress > 0 and not conservative:
        raise RecipeError(
            f'loss.stress = {recipe.loss.stress:g} cannot be combined with model.forces = "direct": stress '
            'is a derivative of the energy. Nearest: loss.stress = 0, or model.forces = "conservative"'
        )
    parts = ranks * recipe.batch.accumulation
    if recipe.batch.structures < parts:
        raise RecipeError(
            f"batch.structures = {recipe.batch.structures} cannot be divided among {ranks} rank(s) × "
            f"{recipe.batch.accumulation} micro-batch(es). Nearest: batch.structures = {parts}"
        )


def _check_offloading(recipe: Recipe, ranks: int) -> None:
    zero = recipe.zero
    optimizer = f'zero.offload_optimizer = "{zero.offload_optimizer}"'
    if zero.offload_optimizer != "none" and zero.stage == 0:
        raise RecipeError(
            f"{optimizer} cannot be combined with zero.stage = 0, where DeepSpeed silently offloads nothing. "
            "Nearest: zero.stage = 1"
        )
    if zero.offload_optimizer == "nvme" and zero.stage < 3:
        raise RecipeError(
            f"{optimizer} cannot be combined with zero.stage = {zero.stage}, where DeepSpeed silently keeps "
            'all in memory. Nearest: zero.stage = 3, or zero.offload_optimizer = "cpu"'
        )
    if zero.offload_parameters != "none" and zero.stage < 3:
        raise RecipeError(
            f'zero.offload_parameters = "{zero.offload_parameters}" cannot be combined with zero.stage = '
            f"{zero.stage}, where every rank keeps all weights. Nearest: zero.stage = 3, or "
            'zero.offload_parameters = "none"'
        )
    if zero.offload_optimizer != "nvme":
        return
    if zero.nvme_path is None:
        raise RecipeError(
            'zero.nvme_path is missing, and the optimizer is offloaded to "nvme": name a directory on a '
            "fast disk of this machine"
        )
    least = math.isqrt(LEAST_IN_FILES // 4 * ranks - 1) + 1
    if recipe.model.width < least:
        raise RecipeError(
            f"model.width = {recipe.model.width} leaves nothing to offload to NVMe on {ranks} rank(s): parts "
            f"of weights below {LEAST_IN_FILES // 2**20} MiB stay in memory. Nearest: model.width = {least}, "
            'or "cpu" instead of "nvme"'
        )
