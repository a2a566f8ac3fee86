"""A run in the workers of a Ray cluster, by Ray Train:

    python examples/clusters/ray_train.py --workers 2 CONFIG.yaml [--dotted.field value ...]

Each worker has a GPU of its own, or with --cpu a core. Model, data and output lie on a disk that all of them see.
docs/clusters.md
"""

import argparse
import os


def work(job: dict) -> None:
    """One worker: Ray has told its process who the others are."""
    os.chdir(job["folder"])  # Ray starts it elsewhere

    from flashbone.train.recipe import load_recipe
    from flashbone.train.run import train

    recipe = load_recipe(job["config"], job["overrides"])
    train(recipe, resume=True)  # a worker that starts anew goes on from the last checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train with flashbone in the workers of a Ray cluster.", allow_abbrev=False
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="without GPUs")
    parser.add_argument("config", metavar="CONFIG.yaml")
    options, overrides = parser.parse_known_args()

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    overrides += ["--training.use_cpu", "true"] if options.cpu else []
    job = {"folder": os.getcwd(), "config": os.path.abspath(options.config), "overrides": overrides}
    TorchTrainer(
        work,
        train_loop_config=job,
        torch_config=TorchConfig(backend="gloo" if options.cpu else "nccl"),
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=not options.cpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()


if __name__ == "__main__":
    main()
