"""Provokes faults on tiny random models, and says of each what was done, how often, and what was lost.

    python tools/provoke_faults.py kill-training --count 50 --work faults
    python tools/provoke_faults.py full-disk read-only damaged clock --count 5

One line for each fault; status 1 where one of them did harm. Results are kept in WORK/FAULT/results.jsonl: the same command goes
on where it was interrupted, and counts what is there. No network, no GPU; disks are made with `mount`, which takes root.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}

import disk_faults  # noqa: E402
import kill_faults  # noqa: E402
import torch  # noqa: E402

FAULTS = {
    "kill-training": kill_faults.kill_training,
    "terminate-training": kill_faults.terminate_training,
    "kill-store": kill_faults.kill_store,
    "kill-export": kill_faults.kill_export,
    "kill-edits": kill_faults.kill_edits,
    "full-disk": disk_faults.full_disk,
    "read-only": disk_faults.read_only,
    "damaged": disk_faults.damaged,
    "lost-process": disk_faults.lost_process,
    "clock": disk_faults.clock,
    "locale": disk_faults.locale,
}


def main() -> None:
    about = "\n".join(f"  {name:<20}{fault.__doc__}" for name, fault in FAULTS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nfaults:\n{about}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("faults", nargs="+", choices=FAULTS, metavar="FAULT")
    parser.add_argument("--count", type=int, default=50, help="how often each is provoked")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--work", type=Path, help="folder to work in and to go on in; default: one that is removed")
    options = parser.parse_args()
    torch.set_num_threads(1)  # no thread pool that a forked process would wait for
    with tempfile.TemporaryDirectory() as scratch:
        work = (options.work or Path(scratch)).resolve()
        os.environ.setdefault("LIT_LLM_CACHE", str(work / "cache"))
        _warm()
        harmless = [provoke(name, work / name, options.count, options.seed) for name in options.faults]
    sys.exit(0 if all(harmless) else 1)


def provoke(name: str, place: Path, count: int, seed: int) -> bool:
    """Provoke a fault until there are `count` results, print a line, and say whether all went well."""
    place.mkdir(parents=True, exist_ok=True)
    kept = place / "results.jsonl"
    results = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    random = Random(f"{seed} {name} {len(results)}")
    harm = ""
    if len(results) < count:
        try:
            for result in FAULTS[name](place, random):
                results.append(result)
                with kept.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                if len(results) >= count:
                    break
        except Exception as error:
            traceback.print_exc()
            harm = f"; HARM after that: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    print(
        f"{name}: {len(results)} times ({_counted(results, 'during')}); lost: {_counted(results, 'lost')}{harm}",
        flush=True,
    )
    return not harm


def _counted(results: list[dict], key: str) -> str:
    return ", ".join(f"{what} x{number}" for what, number in Counter(r[key] for r in results).most_common()) or "-"


def _warm() -> None:
    """Import now what every process would import."""
    import tensorboard.summary.writer.event_file_writer  # noqa: F401
    from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401
    from transformers.utils.logging import disable_progress_bar

    import lit_llm.callbacks.report  # noqa: F401
    import lit_llm.training_cli  # noqa: F401
    from lit_llm.callbacks import default_callbacks

    default_callbacks()
    disable_progress_bar()


if __name__ == "__main__":
    main()
