"""`qlora-kit generate`: one prompt, or a file of prompts, answered by the base or adapters."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.cli.adapters import StoreOption
from qlora_kit.cli.engine import plan_engine
from qlora_kit.cli.output import JsonOption, counting, print_json, say
from qlora_kit.cli.sampling import (
    AdapterOption,
    BaseOption,
    MaxNewTokensOption,
    MinPOption,
    RepetitionPenaltyOption,
    SeedOption,
    SystemOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    sampling_of,
)
from qlora_kit.errors import ConfigError

if TYPE_CHECKING:
    from qlora_kit.batch import AnsweredRow, Question
    from qlora_kit.engine import Answer, Engine
    from qlora_kit.generation import Sampling


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The user's turn; - reads it from stdin.")] = None,
    *,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="A file of prompts: text lines, or rows with `prompt` and, if wanted, `adapter` and `system`.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="With --prompts: the JSONL file to write; a stopped run goes on where it stood."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --out.")] = False,
    base: BaseOption = None,
    adapter: AdapterOption = None,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    seed: SeedOption = None,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Answer a prompt, or each prompt of a file (JSONL, on stdout or in the file of --out)."""
    from qlora_kit.base_files import read_model_config
    from qlora_kit.batch import require_new_file, require_prompts
    from qlora_kit.models import load_tokenizer

    if out is None and overwrite:
        what = "--overwrite is given without --out"
        raise ConfigError(what, expected="a file to replace", fix="name it with --out, or leave --overwrite out")
    questions = _questions(prompt, prompts, out, adapter=adapter, system=system)
    if out is not None:
        require_new_file(out, overwrite=overwrite)
    sampling = sampling_of(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    mixes = list(dict.fromkeys(question.adapter for question in questions if question.adapter is not None))
    plan = plan_engine(base, mixes, store)
    positions = read_model_config(plan.ref).get("max_position_embeddings")
    require_prompts(questions, plan.contracts, load_tokenizer(plan.ref), positions=positions)
    with plan.open() as engine:
        questions = _loaded(engine, questions)
        _tell_other_system_prompts(engine, questions)
        if out is not None:
            _write(engine, questions, sampling, max_new_tokens, out=out, overwrite=overwrite, json=json)
        elif prompts is not None:
            _print_rows(engine, questions, sampling, max_new_tokens, json=json)
        else:
            _print_answer(engine, questions, sampling, max_new_tokens, json=json)


def _questions(
    prompt: str | None, prompts: Path | None, out: Path | None, *, adapter: str | None, system: str | None
) -> list[Question]:
    """What to answer, from the command line, stdin or a file."""
    import sys

    from qlora_kit.batch import Question, questions_of

    if (prompt is None) == (prompts is None):
        given = "neither a prompt nor --prompts" if prompt is None else "both a prompt and --prompts"
        fix = "write the prompt in quotes, or name a file with --prompts"
        raise ConfigError(f"{given} is given", expected="one of the two", fix=fix)
    if prompts is not None:
        from qlora_kit.data.prompt_file import read_prompts

        if out is not None and out.exists() and prompts.exists() and out.samefile(prompts):
            fix = "give another --out"
            raise ConfigError(f"--out {out}: is the file of prompts", expected="a file of its own", fix=fix)
        return questions_of(read_prompts(prompts), adapter=adapter, system=system)
    if out is not None:
        fix = "leave --out out, or name a file with --prompts"
        raise ConfigError("--out is given for one prompt", expected="--out with --prompts", fix=fix)
    text = sys.stdin.read() if prompt == "-" else str(prompt)
    if not text.strip():
        raise ConfigError("the prompt is empty", expected="some text", fix="write the prompt in quotes")
    return [Question(text, adapter, system)]


def _loaded(engine: Engine, questions: list[Question]) -> list[Question]:
    """The questions with their adapters loaded, by the names that the engine uses them by."""
    names = {mix: engine.load_choice(mix) for mix in {question.adapter for question in questions} if mix is not None}
    return [
        question if question.adapter is None else replace(question, adapter=names[question.adapter])
        for question in questions
    ]


def _tell_other_system_prompts(engine: Engine, questions: list[Question]) -> None:
    asked = {(question.adapter, question.system) for question in questions if question.system is not None}
    for adapter, system in sorted(asked, key=str):
        for name in engine.parts_of(adapter):
            contract = engine.contract(name)
            if contract is not None and (fault := contract.system_prompt_fault(str(system))) is not None:
                say(f"{name}: {fault}")


def _print_answer(
    engine: Engine, questions: list[Question], sampling: Sampling, limit: int | None, *, json: bool
) -> None:
    from qlora_kit.batch import answer_all

    (row,) = answer_all(engine, questions, sampling=sampling, limit=limit)
    if json:
        print_json(_fields(row.answer))
        return
    print(row.answer.text)
    if row.answer.finish_reason == "length":
        say(f"(cut at {row.answer.completion_tokens} tokens; --max-new-tokens raises the limit)")


def _print_rows(
    engine: Engine, questions: list[Question], sampling: Sampling, limit: int | None, *, json: bool
) -> None:
    from qlora_kit.batch import answer_all

    rows = []
    for row in answer_all(engine, questions, sampling=sampling, limit=limit):
        if json:
            rows.append(_content(row))
        else:
            print_json(_content(row))
    if json:
        print_json({"answers": rows})


def _write(
    engine: Engine,
    questions: list[Question],
    sampling: Sampling,
    limit: int | None,
    *,
    out: Path,
    overwrite: bool,
    json: bool,
) -> None:
    from qlora_kit.batch import AnswerLog, answer_all, run_key

    key = run_key(engine, questions, sampling, limit)
    tokens = 0
    with AnswerLog.open(out, key=key, overwrite=overwrite) as log, counting("answering") as bar:
        resumed_from = log.done
        if resumed_from:
            say(f"{out}: going on behind {resumed_from} answers of a run that was stopped")
        for row in answer_all(engine, questions, sampling=sampling, limit=limit, first=log.done):
            log.add(_content(row))
            tokens += row.answer.completion_tokens
            bar.update(bar.task_ids[0], completed=log.done, total=len(questions))
        log.finish()
    if json:
        summary = {"out": str(out), "rows": len(questions), "resumed_from": resumed_from, "completion_tokens": tokens}
        print_json(summary)
    else:
        say(f"{out}: {len(questions)} answers, {tokens:,} tokens in this run")


def _content(row: AnsweredRow) -> dict[str, Any]:
    return {"prompt": row.question.prompt, **_fields(row.answer)}


def _fields(answer: Answer) -> dict[str, Any]:
    content = asdict(answer)
    del content["logprobs"]  # this verb never asks for them
    return content
