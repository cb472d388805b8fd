"""The commands that measure and choose: audit, conflicts, select, report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dissonance.cli.common import Json, Out, Quiet, RunFolder, progress_of, say
from dissonance.cli.engines import EngineName, RayAddress, Storage, WorkerCpus, WorkerGpus, Workers, engine_of
from dissonance.config import DEFAULT_STRATEGY, AuditConfig, Dtype, RewardKind
from dissonance.errors import SettingsError
from dissonance.likelihood import Likelihood
from dissonance.scored import ScoredLikelihood
from dissonance.sections import parse_section

app = typer.Typer()


@app.command()
def audit(
    policy: Annotated[str, typer.Option(help="A causal LM: hub id, folder or .gguf file.")],
    reward_model: Annotated[
        str, typer.Option(help="A sequence classifier (hub id, folder, adapter folder), or module:callable.")
    ],
    prompts: Annotated[str, typer.Option(help="JSONL(.gz), JSON, Parquet, CSV, or a datasets id.")],
    out: Out,
    n: Annotated[int, typer.Option(help="Completions per prompt.")] = 8,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; log-likelihoods are at 1.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; log-likelihoods are without.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion.")] = 256,
    likelihood: Annotated[Likelihood, typer.Option(help="sum (the paper's), mean (per token) or relative.")] = "sum",
    reference: Annotated[
        str | None, typer.Option(help="Reference model, for --likelihood relative and the strategy apl.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter of the policy.")] = None,
    template: Annotated[
        str, typer.Option(help="auto, chat, or a text such as 'Question: {prompt}\\n\\nAnswer:'.")
    ] = "auto",
    reward_kind: Annotated[RewardKind, typer.Option(help="cost: higher is worse.")] = "reward",
    reward_index: Annotated[int | None, typer.Option(help="Which output is the reward.")] = None,
    reward_adapter: Annotated[str | None, typer.Option(help="PEFT adapter of the reward model.")] = None,
    reward_template: Annotated[str, typer.Option(help="auto, chat, pair, or a text with {prompt}.")] = "auto",
    reward_max_length: Annotated[int | None, typer.Option(help="Tokens the reward model reads.")] = None,
    policy_server: Annotated[
        str | None, typer.Option(help="A vLLM server that samples the policy, such as http://127.0.0.1:8000.")
    ] = None,
    policy_served_name: Annotated[str | None, typer.Option(help="What it calls the policy.")] = None,
    reward_server: Annotated[
        str | None, typer.Option(help="A vLLM server that scores, or an address that ends in /get_reward.")
    ] = None,
    reward_served_name: Annotated[str | None, typer.Option(help="What it calls the reward model.")] = None,
    server_requests: Annotated[int | None, typer.Option(help="In flight at once, to each server; default 64.")] = None,
    server_timeout: Annotated[float | None, typer.Option(help="Seconds to wait for a reply; default 1800.")] = None,
    server_patience: Annotated[
        float | None, typer.Option(help="Seconds to wait for a server that is down; default 300.")
    ] = None,
    server_key_env: Annotated[
        str | None, typer.Option(metavar="VARIABLE", help="Environment variable with the servers' API key.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a datasets id.")] = "train",
    text_column: Annotated[str | None, typer.Option(help="Column with the prompt.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column with the prompt's id.")] = None,
    category_column: Annotated[str | None, typer.Option(help="Column with the category.")] = None,
    limit: Annotated[int | None, typer.Option(help="Take the first so many prompts.")] = None,
    sample: Annotated[int | None, typer.Option(help="Draw so many prompts at random.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling of prompts and completions.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="auto: bfloat16 on a GPU that computes in it.")] = "auto",
    tokens_per_batch: Annotated[int | None, typer.Option(help="Bound on the tokens of one batch.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with a model.")] = False,
    engine: EngineName = "local",
    ray_address: RayAddress = None,
    workers: Workers = None,
    worker_cpus: WorkerCpus = None,
    worker_gpus: WorkerGpus = None,
    storage: Storage = None,
    as_json: Json = False,
    silent: Quiet = False,
) -> None:
    """Sample a policy, score its answers, and report where the reward model and the policy disagree.

    Example: dissonance audit --policy ./policy --reward-model ./reward --prompts prompts.jsonl --out run
    """
    from dissonance.measuring import audit as run_audit

    common = {
        "device": device,
        "dtype": dtype,
        "tokens_per_batch": tokens_per_batch,
        "trust_remote_code": trust_remote_code,
    }
    how = {
        "requests": server_requests,
        "timeout": server_timeout,
        "patience": server_patience,
        "api_key_env": server_key_env,
    }
    if policy_server is None and reward_server is None and any(value is not None for value in how.values()):
        raise SettingsError("the options --server-... are of servers: give --policy-server or --reward-server too")
    config = _parse(
        {
            "prompts": {
                "source": prompts,
                "split": split,
                "text_column": text_column,
                "id_column": id_column,
                "category_column": category_column,
                "limit": limit,
                "sample": sample,
            },
            "policy": {
                "model": policy,
                "adapter": adapter,
                "template": _unescape(template),
                "n": n,
                "temperature": temperature,
                "top_p": top_p,
                "max_new_tokens": max_new_tokens,
                "reference": reference,
                **_server(policy_server, policy_served_name, how, "policy"),
                **common,
            },
            "reward_model": {
                "model": reward_model,
                "adapter": reward_adapter,
                "template": _unescape(reward_template),
                "kind": reward_kind,
                "index": reward_index,
                "max_length": reward_max_length,
                **_server(reward_server, reward_served_name, how, "reward"),
                **common,
            },
            "likelihood": likelihood,
            "seed": seed,
        },
    )
    where = engine_of(engine, address=ray_address, workers=workers, cpus=worker_cpus, gpus=worker_gpus, storage=storage)
    summary = run_audit(config, out, progress_of(silent), engine=where)
    say(summary, as_json, [*_conflict_lines(summary, likelihood), f"report: {out / 'report.html'}"])


@app.command()
def conflicts(
    scored: Annotated[Path, typer.Argument(help="Rows of prompt_id, completion_id, logprob, reward.")],
    out: Out,
    reward_kind: Annotated[RewardKind, typer.Option(help="cost: higher is worse.")] = "reward",
    likelihood: Annotated[ScoredLikelihood, typer.Option(help="sum, or mean (needs n_tokens).")] = "sum",
    as_json: Json = False,
    silent: Quiet = False,
) -> None:
    """Measure conflict in scores you bring: Parquet (a file or a folder), JSONL or CSV, of any size.

    A row per completion, or a row per prompt with lists. The folder OUT can be reported and selected from.

    Example: dissonance conflicts scored.parquet --out run
    """
    from dissonance.measuring import conflicts as run_conflicts

    summary = run_conflicts(scored, out, reward_kind=reward_kind, likelihood=likelihood, progress=progress_of(silent))
    lines = [*_conflict_lines(summary, likelihood), f"tables: {out / 'round-000'}", f"report: {out / 'report.html'}"]
    say(summary, as_json, lines)


@app.command()
def select(
    run: RunFolder,
    budget: Annotated[int, typer.Option(help="Judgements to spend: 1 a comparison or rating, N-1 a ranking of N.")],
    strategy: Annotated[
        str,
        typer.Option(
            help="likelihood_gap, spread, discordant, shf_cas, pacs, kendall, random_prompts, random_pairs, margin, "
            "ensemble, rso, apl."
        ),
    ] = DEFAULT_STRATEGY,
    tau: Annotated[str | None, typer.Option(help="Least K of a prompt: 0.6, or a quantile: q0.9.")] = None,
    delta: Annotated[str | None, typer.Option(help="Least |PACS| of a completion: 1.2, or a quantile: q0.8.")] = None,
    seed: Annotated[int, typer.Option(help="Of the strategies that draw.")] = 0,
    round_number: Annotated[
        int | None, typer.Option("--round", min=0, help="Which round to choose from; by default the latest.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose what to ask people, within a budget; writes queries.parquet into the round's folder.

    Example: dissonance select run --budget 200
    """
    from dissonance.measuring import select as run_select

    chosen = run_select(
        run, strategy=strategy, budget=budget, tau=tau, delta=delta, seed=seed, round_number=round_number
    )
    folder = run / f"round-{chosen['round']:03d}"
    say(chosen, as_json, [*chosen["explanation"], f"queries: {folder / 'queries.parquet'}"])


@app.command()
def report(run: RunFolder, as_json: Json = False) -> None:
    """Write RUN/report.html anew.

    Example: dissonance report run
    """
    from dissonance.report import write_report

    path = write_report(run)
    say({"report": str(path)}, as_json, [f"report: {path}"])


def _parse(values: dict[str, Any]) -> AuditConfig:
    """Parse settings; an error names the option, as it was typed, rather than the setting."""
    try:
        return parse_section(AuditConfig, values)
    except SettingsError as error:
        section, dot, rest = str(error).partition(".")
        prefixes = {"prompts": "--", "policy": "--", "reward_model": "--reward-"}
        if not dot or section not in prefixes:
            raise
        name, _, message = rest.partition(":")
        named = {
            "policy.model": "--policy",
            "prompts.source": "--prompts",
            "policy.server.url": "--policy-server",
            "reward_model.server.url": "--reward-server",
        }.get(f"{section}.{name}")
        if named is None and name.startswith("server."):
            named = "--" + name.replace(".", "-").replace("_", "-")
        raise SettingsError(f"{named or prefixes[section] + name.replace('_', '-')}:{message}") from error


def _server(url: str | None, served_name: str | None, how: Mapping[str, Any], model: str) -> dict[str, Any]:
    """A model's `server`, of the options that were given."""
    if url is not None:
        given = {"url": url, "served_name": served_name, **how}
        return {"server": {name: value for name, value in given.items() if value is not None}}
    if served_name is not None:
        raise SettingsError(f"--{model}-served-name is the name on a server: give --{model}-server too")
    return {}


def _unescape(template: str) -> str:
    return template.replace("\\n", "\n")


def _conflict_lines(summary: Mapping[str, Any], likelihood: Likelihood) -> list[str]:
    kendall, rho = summary["kendall_tau_distance"], summary.get("length_correlation")
    lines = [f"{summary['prompts']:,} prompts, {summary['completions']:,} completions"]
    if kendall["mean"] is None:
        return [*lines, "every prompt is degenerate: its rewards or its log-likelihoods are constant"]
    lines += [
        f"Kendall-tau distance: {kendall['mean']:.3f}",
        f"independent scores would give: {kendall['null_mean']:.3f}, with sd {kendall['null_sd']:.3f} between prompts",
        f"prompts above that: {kendall['share_above_null']:.1%}, by chance {kendall['null_share_above']:.1%}",
        f"significantly: {kendall['share_significant']:.1%}, by chance {kendall['null_share_significant']:.1%}",
        f"mean |PACS|: {summary['mean_abs_pacs']:.3f}",
    ]
    if summary["repeated_answers"] > 0.01:
        lines.append(
            f"repeated answers: {summary['repeated_answers']:.1%}, which lower the distance and what chance gives; "
            f"over distinct answers: {kendall['distinct_mean']:.3f}, by chance 0.500"
        )
    if rho is not None:
        hint = ", try --likelihood mean" if likelihood == "sum" else ""
        warning = f"; |rho| > 0.5: much of this conflict is length{hint}" if abs(rho) > 0.5 else ""
        lines.append(f"correlation of PACS with length: {rho:+.2f}{warning}")
    notes = {
        "degenerate": "degenerate prompts, with constant rewards or log-likelihoods",
        "truncated": "conversations cut for the reward model, which reads no more",
        "unfinished": "completions that ran into --max-new-tokens",
        "duplicates": "duplicate prompts dropped",
    }
    return lines + [f"{what}: {summary[key]:,}" for key, what in notes.items() if summary.get(key)]
