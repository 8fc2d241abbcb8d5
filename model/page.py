"""The chat page: conversations, drawn by streamlit.

Every click runs :func:`show_page` again from its top (streamlit's way); what lasts is in
``st.session_state``, one for each browser tab. An answer is made in another thread, so a click
elsewhere does not break it off; only stopping does, or the tab that is closed.
"""

import argparse
import time
from typing import Any

import streamlit as st
from streamlit.runtime.scriptrunner import StopException

from .chats import (
    Chat,
    ChatList,
    Reply,
    Turn,
    close_fences,
    escape,
    file_name,
    from_json,
    to_json,
    to_markdown,
    without_images,
)
from .page_answers import Source
from .page_labels import LABELS, LANGUAGES, SUGGESTIONS, language_of
from .page_settings import Labels, pick_source, settings

REFRESH_S, WAIT_S = 0.04, 0.2  # between two pictures of an answer; without anything new
UPLOAD_MB = 20
USER, ASSISTANT = ":material/person:", ":material/smart_toy:"
# streamlit's colours follow the browser's light or dark, so none is set here
STYLE = """<style>
[data-testid="stAppDeployButton"] {display: none}
.block-container, [data-testid="stMainBlockContainer"] {padding-top: 3.5rem}
[data-testid="stChatMessage"] {overflow-wrap: anywhere}
.st-key-chat_list button, .st-key-chat_list button > div {justify-content: flex-start}
.st-key-chat_list button > div, .st-key-chat_list button > div * {min-width: 0}
.st-key-chat_list button p {overflow: hidden; text-overflow: ellipsis; white-space: nowrap}
.st-key-greeting {padding-top: 18vh}
.st-key-greeting [data-testid="stButtonGroup"] * {justify-content: center}
[class*="st-key-edit_"] button {min-height: 1.6rem; padding: 0; opacity: .5}
[data-testid="stSidebarHeader"] {height: 2.5rem}
/* streamlit's own stop ends the script, which then cannot say so: these two do */
.stApp:not([data-test-script-state="running"]) .st-key-when_running {display: none}
.stApp[data-test-script-state="running"] .st-key-when_stopped {display: none}
.stApp[data-test-script-state="running"] [data-testid="stChatMessage"]:has(.st-key-when_running)
  .st-key-answer_under_way [data-testid="stMarkdownContainer"] > :last-child:not(pre):after
  {content: "▍"; opacity: .6; margin-left: .1em}
</style>"""


def show_page(args: argparse.Namespace) -> None:
    """Draw the page, and an answer as it comes."""
    st.set_page_config(page_title="MiniMind", page_icon="💬", layout="centered")
    st.html(STYLE)
    state = st.session_state
    chats: ChatList = state.setdefault("chats", ChatList())
    state.trouble = None
    state.has_stop = state.pop("was_typed", False)  # the box below, in the run that it began
    with st.sidebar:
        labels = _pick_language()
        _chat_list(chats, labels)
        source = state.source_now = pick_source(args, labels)
        sampling, history_cnt = settings(args, chats.current, labels)
    chat = chats.current
    if state.trouble:
        title, detail = state.trouble
        st.error(f"{title}\n\n{escape(detail)}" if detail else title, icon=":material/error:")
    st.chat_input(
        labels["placeholder"],
        key="question",
        submit_mode="stop",
        disabled=source is None,
        on_submit=_ask_typed,
        args=(chats,),
    )
    if not chat.turns:
        _greet(chats, labels, is_open=source is not None)
    for index in range(len(chat.turns)):
        _show_turn(chat, index, labels, source, sampling, history_cnt)


# ---- sidebar ----


def _pick_language() -> Labels:
    state = st.session_state
    state.setdefault("language", language_of(st.context.locale))
    with st.container(
        horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"
    ):
        st.markdown("### MiniMind", anchors=False, width="content")
        st.segmented_control(
            "语言 / Language",
            tuple(LANGUAGES),
            format_func=LANGUAGES.get,
            key="language",
            required=True,
            label_visibility="collapsed",
        )
    return LABELS[state.language]


def _chat_list(chats: ChatList, labels: Labels) -> None:
    with st.container(horizontal=True):
        st.button(
            labels["new_chat"],
            key="new_chat",
            icon=":material/add:",
            on_click=chats.new,
            width="stretch",
        )
        with st.popover("", icon=":material/more_horiz:", help=labels["manage"]):
            _manage(chats, labels)
    if notice := st.session_state.pop("notice", None):
        text, is_error = notice
        (st.error if is_error else st.success)(text)
    with st.container(key="chat_list", gap=None):
        for chat in chats.chats:
            is_open = chat.id == chats.open_id
            st.button(
                escape(chat.name) or labels["new_chat"],
                key=f"open_{chat.id}",
                type="secondary" if is_open else "tertiary",
                icon=":material/chat_bubble:",
                on_click=chats.open,
                args=(chat.id,),
                width="stretch",
            )


def _manage(chats: ChatList, labels: Labels) -> None:
    """Draw what can be done with the open conversation, and with files."""
    state, chat = st.session_state, chats.current
    key = f"title_{chat.id}"
    state[key] = chat.title

    def rename() -> None:
        chat.title = state[key].strip()

    st.text_input(labels["title"], key=key, placeholder=chat.name, on_change=rename)
    st.download_button(
        labels["export_markdown"],
        to_markdown(chat),
        file_name(chat, "md"),
        "text/markdown",
        key="export_markdown",
        on_click="ignore",
        icon=":material/download:",
        width="stretch",
    )
    for name, some in (("export_json", [chat]), ("export_all", chats.chats)):
        st.download_button(
            labels[name],
            to_json(some),
            file_name(chat, "json") if some == [chat] else "minimind-chats.json",
            "application/json",
            key=name,
            on_click="ignore",
            icon=":material/download:",
            width="stretch",
        )
    key_of_file = f"import_{state.setdefault('n_imports', 0)}"  # a new one is empty again
    st.file_uploader(
        labels["import"],
        type="json",
        key=key_of_file,
        max_upload_size=UPLOAD_MB,
        help=labels["import_help"],
        on_change=_import,
        args=(chats, key_of_file, labels),
    )
    st.button(
        labels["delete"],
        key="delete",
        icon=":material/delete:",
        on_click=chats.delete,
        args=(chat.id,),
        width="stretch",
    )


def _import(chats: ChatList, key: str, labels: Labels) -> None:
    state = st.session_state
    file = state[key]
    if file is None:
        return
    state.n_imports += 1
    try:
        read = from_json(file.getvalue())
    except ValueError as error:
        title = labels["import_failed"].format(name=escape(file.name))
        state.notice = (f"**{title}**\n\n{escape(str(error))}", True)
        return
    chats.add(read)
    state.notice = (labels["imported"].format(n=len(read)), False)


# ---- conversation ----


def _ask(chats: ChatList, question: str) -> None:
    if question.strip():
        chats.current.stop_answers()
        chats.current.ask(question)
        st.session_state.editing = None


def _ask_typed(chats: ChatList) -> None:
    st.session_state.was_typed = True
    _ask(chats, st.session_state.question or "")


def _greet(chats: ChatList, labels: Labels, *, is_open: bool) -> None:
    state = st.session_state

    def ask() -> None:
        _ask(chats, state.suggestion or "")
        state.suggestion = None

    with st.container(key="greeting", horizontal_alignment="center"):
        st.markdown(f"## {labels['greeting']}", anchors=False, text_alignment="center")
        if is_open:
            st.pills(
                labels["greeting"],
                SUGGESTIONS[state.language],
                key="suggestion",
                on_change=ask,
                label_visibility="collapsed",
            )


def _show_turn(
    chat: Chat,
    index: int,
    labels: Labels,
    source: Source | None,
    sampling: dict[str, Any],
    history_cnt: int,
) -> None:
    turn, key = chat.turns[index], f"{chat.id}_{index}"
    with st.chat_message("user", avatar=USER):
        if st.session_state.get("editing") == key:
            _edit_form(chat, index, key, labels)
        else:
            with st.container(horizontal=True, wrap=False, vertical_alignment="top"):
                st.text(turn.question, width="stretch")
                st.button(
                    "",
                    key=f"edit_{key}",
                    type="tertiary",
                    icon=":material/edit:",
                    help=labels["edit"],
                    on_click=st.session_state.update,
                    kwargs={"editing": key},
                )
    if turn.reply is None:
        return
    is_last = index == len(chat.turns) - 1
    if is_last and source is not None and not turn.reply.is_done and turn.reply.job is None:
        seed = sampling["seed"]
        if seed is not None:  # the same seed would give the same answer again
            sampling = {**sampling, "seed": seed + len(turn.replies) - 1}
        source.start(chat.messages(history_cnt), sampling, turn.reply)
    with st.chat_message("assistant", avatar=ASSISTANT):
        _show_reply(chat, turn, key, labels, is_last=is_last, can_ask=source is not None)


def _edit_form(chat: Chat, index: int, key: str, labels: Labels) -> None:
    state = st.session_state
    state.setdefault(f"text_{key}", chat.turns[index].question)
    st.text_area(labels["edit"], key=f"text_{key}", label_visibility="collapsed")

    def resend() -> None:
        if state[f"text_{key}"].strip():
            chat.edit(index, state[f"text_{key}"])
            state.editing = None

    with st.container(horizontal=True):
        st.button(labels["resend"], key="resend", type="primary", on_click=resend)
        st.button(labels["cancel"], key="cancel", on_click=state.update, kwargs={"editing": None})


def _show_reply(
    chat: Chat, turn: Turn, key: str, labels: Labels, *, is_last: bool, can_ask: bool
) -> None:
    reply = turn.reply
    is_under_way = not reply.is_done and reply.job is not None
    body = st.container(key="answer_under_way" if is_under_way else f"answer_{key}").empty()
    trouble = st.empty()
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        facts, mark, stop = st.empty(), st.empty(), st.empty()
        if is_under_way:
            _mark_under_way(mark, stop, reply, key, labels)
        _buttons(chat, turn, key, labels, is_last=is_last, can_ask=can_ask)
    if is_under_way:
        _watch(body, facts, reply, labels)
        mark.empty()
        stop.empty()
    _draw(body, facts, reply, labels)
    if reply.error:
        title = labels[f"error_{reply.error_kind}"]
        trouble.error(f"**{title}**\n\n{escape(reply.error)}", icon=":material/error:")
    elif reply.n_left_out:
        trouble.caption(f":material/info: {labels['left_out'].format(n=reply.n_left_out)}")


def _mark_under_way(mark: Any, stop: Any, reply: Reply, key: str, labels: Labels) -> None:
    with mark.container(width="content", gap=None):
        st.container(key="when_running").caption(labels["generating"])
        st.container(key="when_stopped").caption(labels["stopped"])
    if not st.session_state.has_stop:
        stop.button(
            labels["stop_answer"],
            key=f"stop_{key}",
            icon=":material/stop_circle:",
            on_click=_stop,
            args=(reply,),
        )


def _stop(reply: Reply) -> None:
    if reply.job is not None:
        reply.job.cancel()


def _buttons(
    chat: Chat, turn: Turn, key: str, labels: Labels, *, is_last: bool, can_ask: bool
) -> None:
    if len(turn.replies) > 1:
        with st.container(horizontal=True, width="content", vertical_alignment="center", gap=None):
            _icon(f"previous_{key}", "chevron_left", labels["previous"], turn.switch, -1)
            st.caption(f"{turn.shown + 1}/{len(turn.replies)}", width="content")
            _icon(f"next_{key}", "chevron_right", labels["next"], turn.switch, 1)
    if is_last and can_ask:
        _icon(f"regenerate_{key}", "refresh", labels["regenerate"], chat.answer_again)


def _icon(key: str, icon: str, help_text: str, on_click: Any, *args: Any) -> None:
    icon = f":material/{icon}:"
    st.button("", key=key, icon=icon, type="tertiary", help=help_text, on_click=on_click, args=args)


def _watch(body: Any, facts: Any, reply: Reply, labels: Labels) -> None:
    """Show an answer until it is done; streamlit's stop, also for a closed tab, cancels it.

    Any other click ends this function too, but the next run takes the answer up again: a rerun is
    another exception than a stop, unless streamlit runs with its usual runner.fastReruns.
    """
    try:
        while not reply.is_done:
            reply.job.changed.clear()
            _draw(body, facts, reply, labels)
            reply.job.changed.wait(WAIT_S)  # not for ever: only drawing notices the stop
            time.sleep(REFRESH_S)
    except StopException:
        reply.job.cancel()
        raise


def _draw(body: Any, facts: Any, reply: Reply, labels: Labels) -> None:
    if reply.text.strip():
        body.markdown(close_fences(without_images(reply.text)))
    elif not reply.is_done:
        body.caption(labels["waiting"])
    elif not reply.error:
        body.caption(labels["stopped"] if reply.finish_reason == "cancelled" else labels["empty"])
    if line := _facts(reply, labels):
        help_text = None
        if reply.is_done and reply.n_prompt:
            help_text = labels["prompt"].format(n=reply.n_prompt)
            help_text += labels["cached"].format(n=reply.n_cached) if reply.n_cached else ""
        facts.caption(line, help=help_text, width="content")


def _facts(reply: Reply, labels: Labels) -> str:
    """Return how an answer went: tokens, speed, time to the first one, and how it ended."""
    parts = []
    if reply.n_tokens:
        parts.append(labels["n_tokens"].format(n=reply.n_tokens))
    if reply.tokens_per_s:
        parts.append(labels["speed"].format(speed=reply.tokens_per_s))
    if reply.first_token_s is not None:
        parts.append(labels["first_token"].format(s=reply.first_token_s))
    endings = {"cancelled": labels["stopped"], "length": labels["cut"]}
    if reply.text and reply.finish_reason in endings:
        parts.append(endings[reply.finish_reason])
    return " · ".join(parts)
