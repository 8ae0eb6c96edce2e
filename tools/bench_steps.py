"""The training steps of a config on the devices that are here, with random weights and full rows; JSON.

    python tools/bench_steps.py reward-llama31-8b-lora data.rows_per_step=8

The programs and shapes are those that `adaptrm plan` compiles for machines that are not here. MFU is model FLOPs over
the maker's peak; what is computed twice for memory does not count twice.
"""

import argparse
import json
import statistics
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config of ours, or a file")
    parser.add_argument("overrides", nargs="*", help="dotted options, as data.rows_per_step=8")
    parser.add_argument("--steps", type=int, default=5, help="timed, after one that compiles")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from adaptrm.config import load_options, sections_of
    from adaptrm.plan import steps_of
    from adaptrm.train.throughput import peak_flops, peak_memory_gib

    devices = jax.devices()
    overrides = {name: json.loads(value) for name, _, value in (one.partition("=") for one in options.overrides)}
    result = {"device": devices[0].device_kind, "devices": len(devices), "jax": jax.__version__, "steps": {}}
    peak = peak_flops(devices[0].device_kind)
    rng = np.random.default_rng(0)

    def random(shape: jax.ShapeDtypeStruct) -> jax.Array:
        draw = lambda key: 0.02 * jax.random.normal(key, shape.shape, shape.dtype)  # noqa: E731
        return jax.jit(draw, out_shardings=shape.sharding)(jax.random.key(rng.integers(2**31)))

    def zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros(shape.shape, shape.dtype, device=shape.sharding)

    for verb in sections_of(options.config):
        for name, step in steps_of(verb, verb, load_options(options.config, verb, overrides), devices):
            if not name.startswith("train"):
                continue
            rows, length = step.shape
            state, shapes = step.arguments
            parameters = {part: jax.tree.map(random, getattr(state, part)) for part in ("params", "frozen")}
            rest = {part: jax.tree.map(zeros, getattr(state, part)) for part in ("step", "opt_state", "skipped")}
            state = state._replace(**parameters, **rest)
            batch = {
                key: jax.device_put(np.repeat(value[None], rows, 0), shapes[key].sharding)
                for key, value in step.row.items()
            }
            # Zeros would cost less power, and so less time.
            batch["targets"] = jnp.ones_like(batch["targets"])
            batch["tokens"] = jax.random.randint(jax.random.key(0), batch["tokens"].shape, 0, 30_000)
            seconds = []
            with jax.set_mesh(step.mesh):
                for _ in range(options.steps + 1):
                    start = time.perf_counter()
                    state, told = step.jitted(state, batch)
                    jax.block_until_ready((state, told))
                    seconds.append(time.perf_counter() - start)
            took = statistics.median(seconds[1:])
            result["steps"][name] = {
                "seconds": round(took, 4),
                "seconds_with_compilation": round(seconds[0], 1),
                "all_seconds": [round(each, 4) for each in seconds[1:]],
                "rows": rows,
                "row_length": length,
                "tokens_per_second": round(rows * length / took),
                "mfu": peak and round(step.flops / took / (peak * len(devices)), 4),
                "memory_gib": peak_memory_gib(devices),
                "told": {key: float(value) for key, value in told.items() if jnp.ndim(value) == 0},
            }
            del state
    result["overrides"] = overrides
    text = json.dumps(result, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
