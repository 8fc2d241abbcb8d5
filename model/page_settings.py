"""The sidebar's settings: who answers, and how."""

import argparse
import hashlib
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import streamlit as st

from .chats import Chat, escape
from .page_answers import LocalModel, Server, Source, list_local, list_remote, load_local
from .remote import DEFAULT_URL

Labels = dict[str, str]
# name: least, most, step
SLIDERS = {
    "temperature": (0.0, 2.0, 0.05),
    "top_p": (0.0, 1.0, 0.01),
    "min_p": (0.0, 1.0, 0.01),
    "repetition_penalty": (0.5, 2.0, 0.01),
    "presence_penalty": (-2.0, 2.0, 0.1),
    "frequency_penalty": (-2.0, 2.0, 0.1),
}
NUMBERS = {"max_new_tokens": (1, 1_000_000), "top_k": (0, 1_000_000)}
MOST_HISTORY = 40
MODELS_KEPT = 3  # in memory, the last ones used


# ---- who answers ----


def pick_source(args: argparse.Namespace, labels: Labels) -> Source | None:
    """Draw the choice of who answers; None, with a message on the page, where there is nobody."""
    state = st.session_state
    state.setdefault("source", "server" if args.base_url else "local")
    kind = st.segmented_control(
        labels["source"],
        ("local", "server"),
        format_func=labels.get,
        key="source",
        required=True,
        width="stretch",
    )
    return _pick_server(args, labels) if kind == "server" else _pick_local(args, labels)


def _pick_local(args: argparse.Namespace, labels: Labels) -> LocalModel | None:
    choices, missing = _list_local(str(vars(args)), args)
    is_gone = bool(missing and (args.weights or args.load_from or args.lora))
    if not choices:
        title = f"**{labels['named_missing']}**" if is_gone else labels["no_model"]
        st.session_state.trouble = (title, missing)
        return None
    choice = st.selectbox(
        labels["model"],
        choices,
        index=None if is_gone else 0,
        format_func=lambda choice: choice.name,
        help=labels["model_help"],
        key="local_model",
        persist_state="session",
    )
    if choice is None:
        st.session_state.trouble = (f"**{labels['named_missing']}**", missing)
        return None
    stamps = _stamps(choice.path), choice.adapter and _stamps(choice.adapter)
    try:
        with st.spinner(labels["loading"]):
            model = _load_local(choice.name, choice.path, choice.adapter, stamps, choice, args)
    except (OSError, ValueError, MemoryError, RuntimeError) as error:  # torch: out of memory
        st.session_state.trouble = (
            f"**{labels['load_failed']}**",
            str(error) or type(error).__name__,
        )
        return None
    paths = filter(None, (choice.path, choice.adapter))
    st.caption(labels["facts"].format(**model.facts))
    st.caption(" + ".join(escape(str(path)) for path in paths))
    return model


@st.cache_data(ttl=3, show_spinner=False)
def _list_local(key: str, _args: argparse.Namespace) -> tuple[list[Any], str]:
    return list_local(_args)


@st.cache_resource(
    max_entries=MODELS_KEPT,
    show_spinner=False,
    validate=lambda model: model.is_alive,
    on_release=lambda model: model.close(),
)
def _load_local(
    name: str, path: Path, adapter: Path | None, stamps: Any, _choice: Any, _args: Any
) -> LocalModel:
    """Load a model once for all tabs; again where its file has changed (``stamps``)."""
    return load_local(_choice, _args)


def _stamps(path: Path) -> str:
    files = sorted(path.iterdir()) if path.is_dir() else [path, path.with_suffix(".json")]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    facts = [(name, stat.st_mtime_ns, stat.st_size) for name, stat in stats]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _pick_server(args: argparse.Namespace, labels: Labels) -> Server | None:
    state = st.session_state
    state.setdefault("base_url", args.base_url or DEFAULT_URL)
    state.setdefault("api_key", "")
    keep = {"persist_state": "session"}
    help_text = labels["base_url_help"].format(url=DEFAULT_URL)
    url = st.text_input(
        labels["base_url"], key="base_url", help=help_text, on_change=_forget_key, **keep
    )
    url = url.strip().rstrip("/")
    # who looks at the page may use the configured key where it belongs, and not have it: it is in
    # no widget, and goes to no address that was typed
    is_configured = url == (args.base_url or "").strip().rstrip("/")
    configured_key = (args.api_key or "").strip() if is_configured else ""
    typed_key = st.text_input(
        labels["api_key"],
        key="api_key",
        type="password",
        help=labels["api_key_help"],
        placeholder=labels["api_key_placeholder"] if configured_key else "",
        **keep,
    ).strip()
    server = Server(url, typed_key or configured_key, "", is_typed=not is_configured)
    names, kind, error = _list_remote(server)
    if error:
        state.trouble = (f"**{labels[f'error_{kind}']}**", error)
        return None
    name = st.selectbox(
        labels["model"], names or ["minimind"], key="server_model", accept_new_options=True, **keep
    )
    return replace(server, name=name)


def _forget_key() -> None:
    """Clear the key that was typed for the address before."""
    st.session_state.api_key = ""


@st.cache_data(ttl=5, show_spinner=False, max_entries=100, hash_funcs={Server: astuple})
def _list_remote(server: Server) -> tuple[list[str], str, str]:
    return list_remote(server)


# ---- how ----


def settings(args: argparse.Namespace, chat: Chat, labels: Labels) -> tuple[dict[str, Any], int]:
    """Draw the settings; return the sampling options and how many messages are remembered."""
    state = st.session_state
    if "temperature" not in state:
        _reset(args)
    with st.expander(labels["settings"], icon=":material/tune:"):
        _system(chat, labels)
        _widget(st.slider, "history_cnt", labels, 0, MOST_HISTORY, step=2)
        _widget(st.slider, "temperature", labels, *SLIDERS["temperature"][:2], step=0.05)
        _widget(st.number_input, "max_new_tokens", labels, *NUMBERS["max_new_tokens"])
        _widget(st.number_input, "top_k", labels, *NUMBERS["top_k"])
        for name, (least, most, step) in SLIDERS.items():
            if name != "temperature":
                _widget(st.slider, name, labels, least, most, step=step)
        st.multiselect(
            labels["stop"],
            state.stop,
            key="stop",
            accept_new_options=True,
            help=labels["stop_help"],
            placeholder=labels["stop_placeholder"],
        )
        _widget(
            st.number_input,
            "seed",
            labels,
            0,
            2**53 - 1,  # what a browser counts exactly
            step=1,
            placeholder=labels["seed_placeholder"],
        )
        st.button(labels["reset"], on_click=_reset, args=(args,), icon=":material/restart_alt:")
    sampling = {name: state[name] for name in (*NUMBERS, *SLIDERS, "seed")}
    sampling["stop"] = tuple(text.replace("\\n", "\n") for text in state.stop)
    return sampling, state.history_cnt


def _widget(draw: Any, name: str, labels: Labels, *limits: float, **facts: Any) -> None:
    draw(labels[name], *limits, key=name, help=labels[f"{name}_help"], **facts)


def _system(chat: Chat, labels: Labels) -> None:
    key = f"system_{chat.id}"
    st.session_state.setdefault(key, chat.system)

    def keep() -> None:
        chat.system = st.session_state[key]

    st.text_area(labels["system"], key=key, help=labels["system_help"], on_change=keep, height=80)


def _reset(args: argparse.Namespace) -> None:
    """Set all to what the flags say, within what the widgets can show."""
    state = st.session_state
    for name, (least, most, _) in SLIDERS.items():
        state[name] = min(max(float(getattr(args, name)), least), most)
    for name, (least, most) in NUMBERS.items():
        state[name] = min(max(getattr(args, name), least), most)
    state.seed = args.seed
    state.stop = [text.replace("\n", "\\n") for text in args.stop]
    state.history_cnt = min(args.history_cnt, MOST_HISTORY)
