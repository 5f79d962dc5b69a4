"""Owns what the sandbox's Prefect knows of the flows: the work pools, and one deployment `*/sandbox` of each flow.

    python -m sandbox.deployments

A process of its own: it loads the flow files by their paths, so that the form on a deployment's page shows their real
parameters, and ends. Descriptions, tags and the names of the other environments' work pools are `prefect.yaml`'s.
"""

import asyncio
import contextlib
import inspect
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import load_script_as_module
from prefect.workers.process import ProcessWorker
from ruamel.yaml import YAML

from sandbox.conductor import CHECKOUT, POOL, wait_for_server
from sandbox.database import ENVIRONMENT

_DEFINITIONS = CHECKOUT / "prefect.yaml"


def main() -> None:
    """Makes the pools and deployments, or brings those that are there up to date."""
    asyncio.run(_deploy())


async def _deploy() -> None:
    definitions = YAML(typ="safe").load(_DEFINITIONS) if _DEFINITIONS.exists() else {}
    declared: list[Mapping[str, Any]] = definitions.get("deployments") or []
    flows = list(_flows())  # before the server is waited for: both take seconds
    wait_for_server()
    async with get_client() as client:
        for pool in sorted({POOL, *_pools(declared)}):
            await _make_pool(client, pool)
        for file, flow in flows:
            await _make_deployment(client, file, flow, declared)


def _flows() -> Iterator[tuple[Path, Flow[..., Any]]]:
    """Every flow that a file in `flows/` defines; one that it only imports belongs to another file."""
    for file in sorted((CHECKOUT / "flows").glob("*.py")):
        for found in vars(load_script_as_module(str(file))).values():
            if isinstance(found, Flow) and Path(inspect.getfile(inspect.unwrap(found.fn))).resolve() == file.resolve():
                yield file, found


def _file_of(flow: Flow[..., Any]) -> Path:
    # The function as it was written, below decorators that may live elsewhere.
    return Path(inspect.getfile(inspect.unwrap(flow.fn))).resolve()


def _pools(declared: list[Mapping[str, Any]]) -> Iterator[str]:
    for deployment in declared:
        if name := (deployment.get("work_pool") or {}).get("name"):
            yield name


async def _make_pool(client: PrefectClient, name: str) -> None:
    template = ProcessWorker.get_default_base_job_template()
    with contextlib.suppress(ObjectAlreadyExists):
        await client.create_work_pool(WorkPoolCreate(name=name, type=ProcessWorker.type, base_job_template=template))


async def _make_deployment(client: PrefectClient, file: Path, flow: Flow[..., Any], declared: list[Mapping[str, Any]]) -> None:
    entrypoint = f"{file.relative_to(CHECKOUT)}:{flow.fn.__name__}"
    like = next((other for other in declared if other.get("entrypoint") == entrypoint), {})
    await client.create_deployment(
        flow_id=await client.create_flow(flow),
        name=ENVIRONMENT,
        entrypoint=entrypoint,
        path=str(CHECKOUT),
        pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(CHECKOUT)}}],
        work_pool_name=POOL,
        job_variables=_job_variables(file, flow),
        parameters={"environment": ENVIRONMENT},
        parameter_openapi_schema=parameter_schema(flow).model_dump_for_openapi(),
        enforce_parameter_schema=True,
        description=like.get("description") or _first_paragraph(flow),
        tags=_tags(like),
        schedules=[],
        paused=False,
    )


def _job_variables(file: Path, flow: Flow[..., Any]) -> dict[str, Any]:
    # With a command of its own, and told its flow, the worker starts one interpreter for a run. Without, it starts two:
    # the first one fetches the code, which lies here already.
    return {
        "command": shlex.join([sys.executable, "-m", "prefect.engine"]),
        "env": {"PREFECT__FLOW_ENTRYPOINT": f"{file}:{flow.fn.__name__}"},
        "working_dir": str(CHECKOUT),
    }


def _first_paragraph(flow: Flow[..., Any]) -> str:
    return inspect.cleandoc(flow.description or flow.name).split("\n\n")[0]


def _tags(like: Mapping[str, Any]) -> list[str]:
    """The tags of a like deployment; the one that names its environment gives way to ours."""
    theirs = (like.get("parameters") or {}).get("environment")
    return [ENVIRONMENT if tag == theirs else tag for tag in like.get("tags") or [ENVIRONMENT]]


if __name__ == "__main__":
    main()
