"""Write the teacher store that a config names, without training.

    python tools/cache_teacher.py --config configs/kd.yaml --model.init_args.teacher_store.folder=stores/smollm2

Takes the configs and overrides of `fit`, which would write the same store before its first step. Several processes
(`--trainer.devices=4 --trainer.strategy=ddp`) share the work; one that was killed goes on where it stopped.
"""

from __future__ import annotations

import sys

from lit_llm.training_cli import TrainingCLI


def main() -> None:
    options = sys.argv[1:]
    if options[:1] != ["cache_teacher"]:  # the processes that Lightning starts beside this one have it
        options = ["cache_teacher", *options]
    try:
        TrainingCLI.run(options)
    except (ValueError, OSError) as error:
        sys.exit(f"cache_teacher: {error}")


if __name__ == "__main__":
    main()
