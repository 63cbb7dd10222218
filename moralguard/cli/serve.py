"""``moralguard serve``: an OpenAI-compatible server that generates and scores through a guard."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moralguard.cli.console import DtypeOption, ModelOption, err
from moralguard.errors import ModelError, PolicyError

if TYPE_CHECKING:
    from moralguard.serving.config import ServingConfig

_LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    model: ModelOption = "smollm2-135m",
    policy: Annotated[
        list[str] | None,
        typer.Option(help="A built-in name or ID=FILE; may be repeated, from the loosest to the strictest. detox where none is given."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="The operator's YAML or JSON file, instead of --policy.")] = None,
    default: Annotated[
        str | None, typer.Option(help="Policy of requests that name none; `none` leaves those unguarded. The first where not given.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    served_model_name: Annotated[str | None, typer.Option(help="What requests call the model; --model where not given.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the API keys, separated by commas; no key is asked for without it.")
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Continuations that run side by side.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=0, help="Continuations that may wait; more are answered with 429.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most where the request doesn't say.")] = 1024,
    max_seconds: Annotated[float, typer.Option(min=1, help="How long one continuation may run.")] = 600.0,
    max_body_mb: Annotated[float, typer.Option(min=0.01, help="Size of a request's body at most, in MiB.")] = 4.0,
    audit: Annotated[Path | None, typer.Option(help="Append a line for every continuation to this file.")] = None,
    audit_key_env: Annotated[str | None, typer.Option(help="Environment variable whose value keys the hashes in the audit log.")] = None,
    audit_text: Annotated[bool, typer.Option("--audit-text", help="Write prompts and answers to the audit log, too.")] = False,
    chat_template: Annotated[Path | None, typer.Option(help="A Jinja chat template, for models that bring none.")] = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Serve a model through a guard, with OpenAI's endpoints."""
    served = _config(config, policy or [], default)
    keys = [key for key in _variable(api_key_env, "--api-key-env").split(",") if key.strip()]
    secret = _variable(audit_key_env, "--audit-key-env").encode()
    template = None if chat_template is None else _read(chat_template)
    try:
        import uvicorn

        from moralguard.serving.audit import AuditLog
        from moralguard.serving.server import create_app
        from moralguard.serving.state import ServerSettings
    except ImportError as error:
        raise ModelError(f"the server needs {error.name}, which isn't installed; run: pip install 'moralguard[serve]'") from None
    from moralguard.models import load_model

    with err.status("loading the model"):
        lm = load_model(model, dtype=dtype)
        if template is not None and lm.tokenizer is not None:
            lm.tokenizer.chat_template = template
        settings = ServerSettings(
            served_model_name=served_model_name or model,
            max_running=max_running,
            max_waiting=max_waiting,
            default_max_tokens=max_tokens,
            max_seconds=max_seconds,
            max_body_bytes=int(max_body_mb * 2**20),
        )
        log = None if audit is None else AuditLog(audit, key=secret or None, text=audit_text)
        app = create_app(lm, served, settings, api_keys=[key.strip() for key in keys], audit=log)
    if host not in _LOCAL and not keys:
        err.print("[yellow]anybody who reaches this address may use the server[/]: give --api-key-env, or listen on 127.0.0.1")
    policies = ", ".join(each.id + (" (default)" if each.id == served.default else "") for each in served.policies)
    err.print(f"serving {settings.served_model_name}; policies: {policies}", markup=False)
    uvicorn.run(app, host=host, port=port, log_level="info", timeout_graceful_shutdown=5)


def _config(file: Path | None, policies: list[str], default: str | None) -> ServingConfig:
    from moralguard.serving.config import ServingConfig

    if file is not None:
        if policies:
            raise PolicyError("--config and --policy were both given; list the policies in the file")
        config = ServingConfig.load(file)
        return config if default is None else config.replaced(default=_chosen(default))
    entries = []
    for given in policies or ["detox"]:
        name, equals, source = given.partition("=")
        # a bare path has no id of its own: its file's name is one
        entries.append({"id": name if equals else Path(given).stem, "policy": source if equals else given})
    config = ServingConfig(policies=entries, default=entries[0]["id"] if default is None else _chosen(default))
    for entry in config.policies:
        config.policy(entry.id)
    return config


def _chosen(default: str) -> str | None:
    return None if default == "none" else default


def _variable(name: str | None, option: str) -> str:
    if name is None:
        return ""
    value = os.environ.get(name, "")
    if not value.strip():
        raise PolicyError(f"{option} names the environment variable {name}, which isn't set or is empty")
    return value


def _read(template: Path) -> str:
    try:
        return template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"the chat template {str(template)!r} can't be read: {type(error).__name__}") from None
