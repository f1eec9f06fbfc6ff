"""The commands of somebody who puts a trained model to work: many users' lists, a server, a folder to carry away."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lasar.errors import require

RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder a recipe was run in, such as runs/demo.")
]


def score(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="Folder of the Parquet parts; an unfinished one is continued.")],
    users: Annotated[
        Path | None, typer.Option(help=".txt, .csv or .parquet with user ids; everybody else.")
    ] = None,
    k: Annotated[int, typer.Option(help="How many items for each user.")] = 20,
    exclude_seen: Annotated[bool, typer.Option(help="Never recommend an item of the history.")] = False,
    beam_width: Annotated[int, typer.Option(help="Beams of the search.")] = 50,
    depth: Annotated[str, typer.Option(help="Latent steps: auto, sampled, or a number.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of --depth sampled.")] = 0,
    model: Annotated[str | None, typer.Option(help="Training stage; the last by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="On CPUs.")] = "fp32",
    processes: Annotated[int, typer.Option(help="Processes that rank; they share the cores.")] = 1,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Where they are: here, or in a Ray cluster (RAY_ADDRESS).")
    ] = "local",
    part_users: Annotated[int, typer.Option(help="Users of a part.")] = 2000,
) -> None:
    """Write the best next items of many users to Parquet; a killed one goes on."""
    from lasar.scoring import Scoring, score_users

    scoring = Scoring(
        k=k, beam_width=beam_width, exclude_seen=exclude_seen, depth=depth_of(depth), seed=seed,
        precision=precision, part_users=part_users,
    )  # fmt: skip
    elsewhere = None
    if engine == "ray":
        from lasar.cluster.ray_scoring import in_ray

        require("ray", extra="ray")
        elsewhere = in_ray
    done = score_users(
        run, out, scoring=scoring, users=users, model=model, device=device, processes=processes, elsewhere=elsewhere
    )  # fmt: skip
    print(
        f"{out}: {done['users']:,} users in {done['parts']:,} parts, {done['users_per_second']:,.0f} users/s"
    )


def serve(
    run: RunPath,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    workers: Annotated[int, typer.Option(help="Worker processes; each holds the model.")] = 1,
    model: Annotated[str | None, typer.Option(help="Training stage to serve; the last by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="On CPUs: fp32, bf16, or auto (bf16 if faster).")
    ] = "auto",
    database: Annotated[str | None, typer.Option(help="SQLAlchemy URL; a SQLite file in RUN else.")] = None,
    text_model: Annotated[
        str | None, typer.Option(help="Text encoder for new items; the run's own else.")
    ] = None,
    timeout_ms: Annotated[int, typer.Option(help="Longest time a request may take.")] = 5000,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; the next gets 429.")] = 256,
    max_batch: Annotated[int, typer.Option(help="Requests decoded together.")] = 32,
    retention_days: Annotated[float | None, typer.Option(help="Delete events older than this.")] = None,
    show_users: Annotated[bool, typer.Option(help="Let anyone list users and see histories.")] = False,
    prompt_memory_mb: Annotated[
        int, typer.Option(help="Megabytes of each worker for histories seen lately.")
    ] = 128,
    threads: Annotated[int | None, typer.Option(help="PyTorch threads of each worker.")] = None,
) -> None:
    """Serve recommendations over HTTP; the admin token comes from LASAR_ADMIN_TOKEN."""
    require("fastapi", extra="serve")
    from lasar.serving.launch import serve as serve_run
    from lasar.serving.settings import Settings

    settings = Settings(
        run=run, workers=workers, model=model, device=device, precision=precision, database=database,
        text_model=text_model, timeout_ms=timeout_ms, max_queue=max_queue, max_batch=max_batch,
        retention_days=retention_days, show_users=show_users, threads=threads, prompt_memory_mb=prompt_memory_mb,
    )  # fmt: skip
    serve_run(settings, host=host, port=port)


def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    model: Annotated[str | None, typer.Option(help="Training stage; the last by default.")] = None,
    anchors: Annotated[bool, typer.Option(help="With the segments that put thoughts into words.")] = True,
    users: Annotated[bool, typer.Option(help="With the event log (personal data).")] = False,
    text_model: Annotated[bool, typer.Option(help="With the text encoder for new items.")] = True,
) -> None:
    """Copy what serving needs into one self-contained folder."""
    require("fastapi", extra="serve")
    from lasar.serving.export import export_run

    facts = export_run(run, out, model=model, anchors=anchors, users=users, text_model=text_model)
    print(f"{out}: {facts['model']}, {facts['num_items']:,} items, {facts['bytes'] / 1e6:,.1f} MB")
    if not facts["text_model"]:
        print("without a text encoder: to add items live, give `lasar serve` one with --text-model")


def depth_of(text: str) -> Any:
    """`--depth` as `Recommender.recommend` takes it."""
    if text in ("auto", "sampled"):
        return text
    if text.isdecimal():
        return int(text)
    raise typer.BadParameter(f"--depth {text}: give auto, sampled, or a number of latent steps")
