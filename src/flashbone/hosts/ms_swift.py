"""A plugin of ms-swift: `swift sft --external_plugins PATH_OF_THIS_FILE --tuner_type bat-row --reft_rank 64 ...`.

ms-swift has `--tuner_type bone`, which takes PEFT's BoneConfig, `--reft_rank` as r, and `--init_weights true|bat`.
Importing this file lets that work again, and adds a tuner for each other variant, by its name, with the same option.
`python -m flashbone.hosts.ms_swift` prints the path.
"""

from typing import Any

from flashbone import BoneConfig
from flashbone.variants import VARIANTS


def register() -> None:
    """Add the variants to ms-swift's table of tuners."""
    from peft import get_peft_model
    from swift.pipelines.train.tuner import (  # pyright: ignore[reportMissingImports]
        get_modules_to_save,
        get_target_modules,
    )
    from swift.tuner_plugin import PeftTuner, tuners_map  # pyright: ignore[reportMissingImports]

    def tuner(variant: str) -> type:
        class BoneTuner(PeftTuner):
            @staticmethod
            def prepare_model(args: Any, model: Any) -> Any:
                task = args.task_type.upper()
                config = BoneConfig(
                    variant=variant,
                    r=args.reft_rank,
                    target_modules=get_target_modules(args, model),
                    modules_to_save=get_modules_to_save(args, model, task),
                    task_type=task,
                )
                return get_peft_model(model, config)

        return BoneTuner

    tuners_map.update({name: tuner(name) for name in VARIANTS if name != "bone"})


if __name__ == "__main__":
    print(__file__)
else:
    register()
