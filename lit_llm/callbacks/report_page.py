"""The report of a run as one HTML page: no script, no network, light and dark, for a wide screen or a phone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import median
from typing import Any

from lit_llm.callbacks.report_chart import Level, Series, line_chart
from lit_llm.callbacks.report_data import RunData
from lit_llm.callbacks.report_edits import edit_section
from lit_llm.callbacks.report_headlines import Headline, headlines
from lit_llm.callbacks.report_languages import language_section
from lit_llm.callbacks.report_preference import preference_figures
from lit_llm.callbacks.report_style import STYLE
from lit_llm.callbacks.report_tokens import token_section

_STUDENT, _TEACHER, _START = "var(--student)", "var(--teacher)", "var(--start)"
_COLOURS = [f"var(--c{i})" for i in range(1, 9)]
_PEOPLE = ("start", "student", "teacher")


def page(run: RunData) -> str:
    """The whole page."""
    title = run.method or run.folder.name
    sections = [
        ("Result", _headline(run)),
        *([("Languages", languages)] if (languages := language_section(run)) else []),
        *([("Edits", edits)] if (edits := edit_section(run)) else []),
        ("Curves", _figures(run)),
        ("Samples", _samples(run)),
        *([("Tokens", tokens)] if (tokens := token_section(run)) else []),
        ("Reproduce", _reproduce(run)),
        ("Environment", _environment(run)),
        ("Configuration", _configuration(run)),
    ]
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name, _ in sections)
    body = "".join(f'<section id="{name.lower()}"><h2>{name}</h2>{content}</section>' for name, content in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)} · {escape(run.folder.name)}</title><style>{STYLE}</style></head>"
        f"<body><header>{_header(run, title)}<nav>{links}</nav></header><main>{body}</main></body></html>\n"
    )


def _header(run: RunData, title: str) -> str:
    who = [_model(run, role, name) for role in ("teacher", "student") if (name := run.model_name(role))]
    models = f"<p class=models>{' <span aria-label=teaches>→</span> '.join(who)}</p>" if who else ""
    where = "/".join(run.folder.absolute().parts[-2:])
    return f"<p class=where>{escape(where)}</p><h1>{escape(title)} {_status(run)}</h1>{models}{_facts(run)}"


def _model(run: RunData, who: str, name: str) -> str:
    """A model's name, with its role where that is not the usual one."""
    role = run.role(who)
    return f"<b class={who}>{escape(name)}</b>" + (f" <small>({escape(role)})</small>" if role != who else "")


def _status(run: RunData) -> str:
    if not run.starts:
        return ""
    ended = run.fit.get("ended")
    status = ended["status"] if ended else "running or killed"
    return f'<span class="status {escape(status.split()[0])}">{escape(status)}</span>'


def _facts(run: RunData) -> str:
    facts = []
    for who in ("student", "teacher"):
        if size := run.fit.get("models", {}).get(who):
            facts.append((run.role(who), f"{_size(size['parameters'])} parameters"))
    if run.last_step:
        facts.append(("optimizer steps", f"{run.last_step:,}"))
    seconds = sum(start.get("ended", {}).get("seconds", 0) for start in run.starts or [] if start["stage"] == "fit")
    if seconds:
        facts.append(("time", _duration(seconds)))
    if speed := run.curve("throughput/tokens_per_second"):
        facts.append(("tokens per second", f"{median(value for _, value in speed):,.0f}"))
    if memory := run.last("throughput/peak_memory_gb"):
        facts.append(("peak memory", f"{memory:.2f} GiB"))
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    error = run.fit.get("ended", {}).get("error")
    return f"<dl class=facts>{items}</dl>" + (f"<p class=error>{escape(error)}</p>" if error else "")


def _headline(run: RunData) -> str:
    if run.curves is None:
        return _missing("metrics.csv", "nothing was logged yet, or the file was removed")
    tables = [_table(run, stage, words) for stage, words in (("test", "Test data"), ("val", "Validation data"))]
    return "".join(tables) or _missing("validation metrics", "the run ended before its first validation")


def _table(run: RunData, stage: str, words: str) -> str:
    logged = [headline for headline in headlines(run) if run.curve(f"{stage}/{headline.name}")]
    if not logged:
        return ""
    rows = [_table_row(run, stage, headline) for headline in logged]
    steps = [run.curve(f"{stage}/{headline.name}")[-1][0] for headline in logged]
    different = (
        ""
        if run.one_tokenizer
        else (
            "<p class=note>The two tokenizers differ, so the teacher's loss and accuracy are per token of its own and not "
            "comparable with the student's.</p>"
        )
    )
    return (
        f"<h3>{words} <small>after {max(steps):,} steps</small></h3><div class=scroll><table class=headline><thead><tr>"
        f"<th></th><th class=start>start</th><th class=student>{escape(run.role('student'))}</th>"
        f"<th class=teacher>{escape(run.role('teacher'))}</th><th>gap closed</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>{different}"
    )


def _table_row(run: RunData, stage: str, headline: Headline) -> str:
    metric, words = f"{stage}/{headline.name}", escape(headline.words)
    now = run.last(metric)
    if headline.of == "teacher":
        return f"<tr><th>{words}</th><td>–</td><td>–</td><td>{_decimal(now)}</td><td>–</td></tr>"
    start = None if headline.implicit and run.starts_at_reference else run.at_start(metric)
    teacher = run.last(f"{stage}/teacher_{headline.name}")
    cells = "".join(f"<td>{_decimal(value)}</td>" for value in (start, now, teacher))
    hint, gap = "", "–"
    if headline.higher is not None:
        best = (max if headline.higher else min)(run.curve(metric), key=lambda point: point[1])
        hint = f"<small>best {_decimal(best[1])} at step {best[0]:,}</small>" if best[1] != now else ""
        if run.one_tokenizer or not headline.per_token:
            gap = _gap(start, now, teacher, headline.higher)
    return f"<tr><th>{words}{hint}</th>{cells}<td>{gap}</td></tr>"


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}" if abs(value) >= 10 else f"{value:.3f}"


def _gap(start: float | None, now: float, teacher: float | None, higher: bool) -> str:
    """The share of the way from start to teacher; nothing to close where the teacher is no better than the start."""
    if start is None or teacher is None or start == teacher or (teacher > start) != higher:
        return "–"
    share = (now - start) / (teacher - start)
    width = 100 * min(max(share, 0.0), 1.0)
    return f'<span class=bar><i style="width:{width:.1f}%"></i></span> {share:.0%}'


def _figures(run: RunData) -> str:
    if run.curves is None:
        return _missing("metrics.csv", "nothing was logged yet, or the file was removed")
    figures = [
        _curves_figure(run, "Training loss and its terms", _loss_terms(run), noisy=True),
        *preference_figures(run),
        _validation_figure(run, "loss", "Validation loss"),
        _validation_figure(run, "rouge_l", "ROUGE-L of generated answers", more=_temperatures(run)),
        _validation_figure(run, "accuracy", "Validation accuracy"),
        _validation_figure(run, "agreement", _agreement(run), more=["t2s_agreement"]),
        _curves_figure(run, "Terms of the validation loss", _validation_terms(run)),
        _curves_figure(run, "Accuracy and agreement in training", _ending(run, "accuracy", "agreement"), noisy=True),
        _curves_figure(run, "Learning rate", ["train/learning_rate"]),
        _curves_figure(run, "Gradient norm", _ending(run, "grad_norm"), noisy=True),
        _curves_figure(run, "Aligned and mapped tokens", _ratios(run)),
        _curves_figure(run, "Tokens per second", _speeds(run)),
    ]
    legend = "Over optimizer steps. Where a curve is noisy, every step is drawn faintly and a moving average over it."
    return f"<p class=note>{legend}</p><div class=figures>{''.join(figures)}</div>"


def _curves_figure(run: RunData, title: str, names: list[str], noisy: bool = False) -> str:
    logged = [name for name in names if run.curve(name)]
    series = [
        Series(name.split("/", 1)[1].replace("_", " "), run.curve(name), colour, noisy)
        for name, colour in zip(logged, _COLOURS, strict=False)
    ]
    broken = sum(len(run.curves[name]) - len(run.curve(name)) for name in logged)
    note = f"{broken} values are not finite and not shown." if broken else ""
    return line_chart(title, series, note=note) if series else ""


def _validation_figure(run: RunData, name: str, title: str, more: Sequence[str] = ()) -> str:
    curve = run.curve(f"val/{name}")
    if not curve:
        return ""
    series = [Series(run.role("student"), curve, _STUDENT)]
    others = [other for other in more if run.curve(f"val/{other}")]
    series += [
        Series(other.replace("_", " "), run.curve(f"val/{other}"), colour)
        for other, colour in zip(others, _COLOURS[2:], strict=False)
    ]
    levels, note = [], ""
    teacher, start = run.last(f"val/teacher_{name}"), run.at_start(f"val/{name}")
    if teacher is not None and (run.one_tokenizer or name == "rouge_l"):
        levels.append(Level(run.role("teacher"), teacher, _TEACHER))
    elif teacher is not None:
        note = "The teacher's is per token of another tokenizer and not drawn."
    if start is not None:
        levels.append(Level("start", start, _START))
    return line_chart(title, series, levels, note)


def _agreement(run: RunData) -> str:
    teacher = "combined teacher" if run.combines_teachers else "teacher"
    return f"Agreement with the {teacher}, validation"


def _loss_terms(run: RunData) -> list[str]:
    if run.on_pairs:  # what else is logged has figures of its own, or is of another size
        terms = ("loss", "kl", "ce", "kl_chosen", "kl_rejected")
        return [name for name in (f"train/{term}" for term in terms) if name in run.names]
    others = {*_ending(run, "accuracy", "agreement", "grad_norm", "ratio"), "train/learning_rate"}
    names = [name for name in run.names if name.startswith("train/") and not name.startswith("train/routing/")]
    return [name for name in names if name not in others]


def _ending(run: RunData, *ends: str) -> list[str]:
    return [name for name in run.names if name.startswith("train/") and name.endswith(ends)]


def _ratios(run: RunData) -> list[str]:
    """Shares of aligned and mapped tokens, unless they are all one: then there is nothing to see."""
    return [name for name in _ending(run, "ratio") if any(value != 1 for _, value in run.curve(name))]


def _speeds(run: RunData) -> list[str]:
    return [name for name in run.names if name.startswith("throughput/") and name.endswith("tokens_per_second")]


def _temperatures(run: RunData) -> list[str]:
    """ROUGE-L at temperatures beside the first."""
    names = [name.removeprefix("val/") for name in run.names if name.startswith("val/rouge_l_t")]
    return [name for name in names if not name.endswith("_std")]


def _validation_terms(run: RunData) -> list[str]:
    names = [name for name in run.names if name.startswith("val/") and name.endswith(("_ce", "_kd", "/ce", "/kd"))]
    return [name for name in names if not name.startswith("val/teacher_")]


def _samples(run: RunData) -> str:
    if not run.samples:
        return _missing("samples.jsonl", "no answers were generated (model.generation.prompts: 0 turns them off)")
    parts = []
    for stage, words in (("test", "test"), ("val", "validation")):
        lines = [line for line in run.samples if line["stage"] == stage]
        if lines:
            last = max(line["step"] for line in lines)
            parts.append(f"<h3>Answers on {words} data <small>after {last:,} steps</small></h3>")
            shown = {line["prompt"]: line for line in lines if line["step"] == last}
            parts += [
                _sample(run, line, [other for other in lines if other["prompt"] == prompt])
                for prompt, line in shown.items()
            ]
    return "".join(parts)


def _sample(run: RunData, line: dict[str, Any], over_time: list[dict[str, Any]]) -> str:
    answers = {"reference": line["reference"], **line["answers"]}
    ordered = sorted(answers, key=lambda who: _PEOPLE.index(who) if who in _PEOPLE else -1)
    cells = "".join(
        f'<div><h4 class="{escape(who)}">{escape(run.role(who))}</h4><p>{escape(answers[who]) or "<i>empty</i>"}</p></div>'
        for who in ordered
    )
    history = "".join(
        f"<li><b>step {other['step']:,}</b> {escape(other['answers'].get('student', ''))}</li>"
        for other in sorted({other["step"]: other for other in over_time}.values(), key=lambda other: other["step"])
    )
    more = (
        f"<details><summary>the {escape(run.role('student'))} over time</summary><ol>{history}</ol></details>"
        if len(over_time) > 1
        else ""
    )
    return f"<article><p class=prompt>{escape(line['prompt'])}</p><div class=answers>{cells}</div>{more}</article>"


def _reproduce(run: RunData) -> str:
    if not run.starts:
        return _missing("environment.json", "the run ended before its first step")
    parts = []
    for start in run.starts:
        ended = start.get("ended")
        how = f"{ended['status']} after {_duration(ended['seconds'])}" if ended else "no end recorded"
        at = f"from step {start['step']:,}, " if start["step"] else ""
        parts.append(
            f"<p>{escape(start['stage'])}, {at}{escape(start['started'])}, {escape(how)}</p>"
            f"<pre>{escape(start['command'])}</pre>"
        )
    if commit := run.fit.get("git"):
        parts.append(f"<p>git commit <code>{escape(commit)}</code></p>")
    if run.has_model:
        parts.append(
            f"<p>Talk to the model</p><pre>python -m lit_llm generate --model {escape(str(run.folder / 'model'))}</pre>"
        )
    return "".join(parts)


def _environment(run: RunData) -> str:
    if not run.starts:
        return _missing("environment.json", "the run ended before its first step")
    left_out = {"command", "stage", "step", "ended", "models", "started", "git"}
    rows = []
    for name, value in run.fit.items():
        if name in left_out:
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {inner}" for key, inner in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        rows.append(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>")
    return f"<div class=scroll><table class=plain>{''.join(rows)}</table></div>"


def _configuration(run: RunData) -> str:
    if run.config_text is None:
        return _missing("config.yaml", "the run was not started by python -m lit_llm")
    return f"<details><summary>config.yaml</summary><pre>{escape(run.config_text)}</pre></details>"


def _missing(what: str, why: str) -> str:
    return f"<p class=missing>Missing: {escape(what)} ({escape(why)}).</p>"


def _size(count: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:,.1f} {letter}"
    return str(count)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
