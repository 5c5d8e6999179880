"""Calls a service from several threads until told to stop; runs inside a pod, prints a line of JSON."""

import json
import signal
import sys
import threading
import time

from equipot.client import Client, ClientError, RetryPolicy

STRUCTURE = {
    "atomic_numbers": [8, 1, 1],
    "positions": [[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]],
}


def main(address: str, callers: int) -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    failures: list[str] = []
    answered = [0] * callers
    energies: set[float] = set()

    def call(place: int) -> None:
        # No call is tried twice: what is counted is what the service did.
        with Client(address, retry=RetryPolicy(attempts=1), timeout=30.0) as client:
            while not stop.is_set():
                try:
                    energies.add(round(float(client.predict([STRUCTURE]).energy[0]), 4))
                    answered[place] += 1
                except ClientError as error:
                    failures.append(f"{time.time():.2f} {error}")
                time.sleep(0.01)

    threads = [threading.Thread(target=call, args=(place,)) for place in range(callers)]
    for thread in threads:
        thread.start()
    print("calling", flush=True)
    while not stop.wait(0.2):
        pass
    for thread in threads:
        thread.join()
    print(
        json.dumps({"answered": sum(answered), "failures": failures, "energies": sorted(energies)}),
        flush=True,
    )


main(sys.argv[1], int(sys.argv[2]))
