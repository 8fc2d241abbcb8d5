"""The chat page as streamlit runs it, without a browser; a tiny model answers."""

import json
import re
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest
from tiny_chat import ROOT, write_chat_weights
from tiny_runs import free_port
from tiny_server import TinyServer, error, says, tiny_server

from model.chats import Chat, ChatList, Turn
from model.page_answers import LocalModel
from model.page_labels import EN, LABELS, LANGUAGES, SUGGESTIONS, ZH, language_of

Open = Callable[..., AppTest]
pytestmark = pytest.mark.slow  # each run of the page takes a quarter of a second


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    write_chat_weights(out / "demo" / "rl_32.pth", max_seq_len=128)
    return out


@pytest.fixture
def open_page(out: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Return a function that opens the page in a tab of its own."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def open_page(*flags: object, out_dir: Path = out) -> AppTest:
        usual = ["--out_dir", out_dir, "--device", "cpu", "--dtype", "float32"]
        usual += ["--temperature", 0, "--max_new_tokens", 8]
        argv = ["fast_inference.py", *map(str, usual), *map(str, flags)]
        monkeypatch.setattr(sys, "argv", argv)
        page = AppTest.from_file(str(ROOT / "fast_inference.py"), default_timeout=60)
        return page.run()

    yield open_page


def ask(page: AppTest, question: str) -> Turn:
    """Type a question; return its turn, answered."""
    page.chat_input[0].set_value(question).run()
    assert not page.exception
    return last(page)


def chats(page: AppTest) -> ChatList:
    return page.session_state["chats"]


def last(page: AppTest) -> Turn:
    return chats(page).current.turns[-1]


def click(page: AppTest, icon_or_label: str) -> None:
    """Click the last button of an icon or a label."""
    found = [
        button
        for button in page.button
        if icon_or_label in (button.label, button.proto.icon.removeprefix(":material/").rstrip(":"))
    ]
    found[-1].click().run()
    assert not page.exception


def shown(page: AppTest) -> str:
    """Return all text on the page."""
    kinds = (page.markdown, page.text, page.caption, page.error, page.success)
    return "\n".join(str(element.value) for kind in kinds for element in kind)


# ---- labels ----


def test_both_languages_say_the_same_things() -> None:
    def fields(text: str) -> set[str]:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}

    assert LABELS.keys() == LANGUAGES.keys() == SUGGESTIONS.keys()
    assert ZH.keys() == EN.keys()
    assert [key for key in ZH if fields(ZH[key]) != fields(EN[key])] == []
    assert [key for key in EN if re.search("[\u4e00-\u9fff]", EN[key])] == []
    assert all(ZH.values()) and all(EN.values())


def test_every_label_is_used_and_there() -> None:
    source = "".join(path.read_text("utf-8") for path in (ROOT / "model").glob("page*.py")
                     if path.stem != "page_labels")  # fmt: skip
    used = set(re.findall(r"""labels\[["']([a-z_0-9]+)["']\]""", source))
    assert used <= ZH.keys(), "said on the page, but not in the tables"
    named = {name for name in re.findall(r'"([a-z_0-9]+)"', source) if name in ZH}
    unused = {key for key in ZH.keys() - used - named if not key.startswith("error_")}
    assert {key.removesuffix("_help") for key in unused} <= used | named, unused


@pytest.mark.parametrize(
    ("locale", "language"),
    [("zh-CN", "zh"), ("zh", "zh"), ("en-US", "en"), ("de", "en"), (None, "zh")],
)
def test_the_language_follows_the_browser(locale: str | None, language: str) -> None:
    assert language_of(locale) == language


def test_the_switch_changes_every_label(open_page: Open) -> None:
    page = open_page()
    assert page.chat_input[0].placeholder == ZH["placeholder"]
    page.segmented_control(key="language").set_value("en").run()
    assert page.chat_input[0].placeholder == EN["placeholder"]
    labels = [w.label for w in (*page.button, *page.slider, *page.number_input, *page.selectbox)]
    assert not [label for label in labels if re.search("[\u4e00-\u9fff]", label)]
    helps = [w.help for w in (*page.slider, *page.number_input, *page.text_area)]
    assert len(helps) >= 10 and all(helps)


# ---- asking ----


def test_a_question_is_answered_with_what_it_took(open_page: Open) -> None:
    page = open_page()
    turn = ask(page, "**你好** <b>x</b>\n  $x$")
    assert turn.reply.finish_reason == "length" and turn.reply.n_tokens == 8
    assert [text.value for text in page.text] == [turn.question], "a user's text is shown as text"
    assert turn.reply.text.strip() in [markdown.value for markdown in page.markdown]
    assert not any(markdown.allow_html for markdown in page.markdown)
    assert re.search(r"8 词元 · [\d.]+ 词元/秒 · 首词元 [\d.]+ 秒 · 达到长度上限", shown(page))


def test_suggestions_ask(open_page: Open) -> None:
    page = open_page()
    page.pills(key="suggestion").set_value(SUGGESTIONS["zh"][0]).run()
    assert last(page).question == SUGGESTIONS["zh"][0] and last(page).reply.text


def test_answering_again_keeps_versions_and_switches(open_page: Open) -> None:
    page = open_page("--temperature", 1, "--seed", 5)
    ask(page, "你好")
    click(page, "refresh")
    first, second = (reply.text for reply in last(page).replies)
    assert first != second, "the seed goes on"
    assert "2/2" in shown(page)
    click(page, "chevron_left")
    assert "1/2" in shown(page) and first in shown(page) and second not in shown(page)
    ask(page, "后来")
    assert chats(page).current.messages(2)[1]["content"] == first
    again = open_page("--temperature", 1, "--seed", 5)
    assert ask(again, "你好").reply.text == first, "the same seed, the same answer"


def test_a_question_can_be_edited(open_page: Open) -> None:
    page = open_page()
    ask(page, "一")
    ask(page, "二")
    page.button(key=f"edit_{chats(page).current.id}_0").click().run()
    [form] = [area for area in page.text_area if area.value == "一"]
    form.set_value("三").run()
    click(page, ZH["cancel"])
    assert [turn.question for turn in chats(page).current.turns] == ["一", "二"]
    page.button(key=f"edit_{chats(page).current.id}_0").click().run()
    [area for area in page.text_area if area.label == ZH["edit"]][0].set_value("四").run()
    click(page, ZH["resend"])
    assert [turn.question for turn in chats(page).current.turns] == ["四"]
    assert last(page).reply.is_done and last(page).reply.text


def test_settings_reach_the_engine(open_page: Open) -> None:
    page = open_page("--stop", "a\nb")
    page.number_input(key="max_new_tokens").set_value(3).run()
    page.text_area(key=f"system_{chats(page).current.id}").set_value("你是助手").run()
    assert ask(page, "你好").reply.n_tokens <= 3
    assert chats(page).current.messages(0)[0] == {"role": "system", "content": "你是助手"}
    assert page.multiselect(key="stop").value == ["a\\nb"]
    click(page, ZH["reset"])
    assert page.number_input(key="max_new_tokens").value == 8


def test_flags_beyond_a_widget_are_brought_within(open_page: Open) -> None:
    page = open_page("--temperature", 9, "--repetition_penalty", 50, "--history_cnt", 1000)
    assert page.slider(key="temperature").value == 2
    assert page.slider(key="repetition_penalty").value == 2
    assert page.slider(key="history_cnt").value == 40
    assert not page.exception


def test_history_depth_decides_what_is_sent(open_page: Open) -> None:
    page = open_page()
    ask(page, "第一个问题")
    with_history = ask(page, "第二个问题").reply
    page.slider(key="history_cnt").set_value(0).run()
    click(page, "refresh")
    assert last(page).reply.n_prompt < with_history.n_prompt


def test_whole_old_messages_are_left_out_and_the_page_says_so(open_page: Open) -> None:
    page = open_page()
    page.slider(key="history_cnt").set_value(40).run()
    for i in range(8):
        turn = ask(page, f"第{i}个问题，讲一讲长江和黄河？")
    assert turn.reply.n_left_out > 0 and not turn.reply.error
    assert ZH["left_out"].format(n=turn.reply.n_left_out) in shown(page)
    turn = ask(page, "长" * 500)
    assert turn.reply.error_kind == "too_long"
    assert any(ZH["error_too_long"] in error.value for error in page.error)
    assert ask(page, "短").reply.text, "and the page goes on"


# ---- several ----


def test_chats_are_made_renamed_and_deleted(open_page: Open) -> None:
    page = open_page()
    ask(page, "一_x_")
    first = chats(page).current
    page.button(key="new_chat").click().run()
    ask(page, "二")
    assert [chat.name for chat in chats(page).chats] == ["二", "一_x_"]
    page.button(key=f"open_{first.id}").click().run()
    assert [text.value for text in page.text] == ["一_x_"]
    assert page.button(key=f"open_{first.id}").label == r"一\_x\_", "not Markdown either"
    page.text_input(key=f"title_{first.id}").set_value(" 新名字 ").run()
    assert first.name == "新名字"
    page.button(key="delete").click().run()
    assert [chat.name for chat in chats(page).chats] == ["二"]
    page.button(key="delete").click().run()
    assert len(chats(page).chats) == 1 and not chats(page).current.turns


def test_files_come_in_and_go_out(open_page: Open) -> None:
    page = open_page()
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    page.file_uploader[0].upload("x.json", json.dumps(messages).encode(), "application/json").run()
    assert not page.exception and ZH["imported"].format(n=1) in shown(page)
    assert [text.value for text in page.text] == ["q"]
    page.file_uploader[0].upload("b*d.json", b'{"x": 1}', "application/json").run()
    assert any('no "chats"' in re.sub(r"\\", "", error.value) for error in page.error)
    assert [text.value for text in page.text] == ["q"], "what is there stays"
    page.run()
    assert not page.error, "told once"


def test_two_tabs_share_the_model_and_nothing_else(open_page: Open) -> None:
    one, other = open_page(), open_page()
    text = ask(one, "你好").reply.text
    assert not chats(other).current.turns
    assert ask(other, "你好").reply.text == text
    engines = [page.session_state["source_now"].thread.engine for page in (one, other)]
    assert engines[0] is engines[1]


# ---- who answers ----


def test_without_weights_the_page_says_what_to_run(open_page: Open, tmp_path: Path) -> None:
    page = open_page(out_dir=tmp_path)
    told = page.error[0].value.replace("\\", "")
    assert "`make demo`" in told and "1-pretrain.py" in told and str(tmp_path) in told
    assert page.chat_input[0].disabled


@pytest.mark.parametrize("flag", ["--weights", "--load_from", "--lora"])
def test_what_a_flag_names_and_is_not_there_is_replaced_by_nothing(
    open_page: Open, tmp_path: Path, flag: str
) -> None:
    page = open_page(flag, tmp_path / "nope")
    told = page.error[0].value.replace("\\", "")
    assert ZH["named_missing"] in told and str(tmp_path / "nope") in told
    assert page.chat_input[0].disabled and page.session_state["source_now"] is None
    page.segmented_control(key="language").set_value("en").run()
    assert EN["named_missing"] in page.error[0].value
    page.selectbox(key="local_model").select_index(0).run()
    assert not page.error and ask(page, "你好").reply.model == "rl_32", "but others can be chosen"


@pytest.mark.parametrize("flag", ["--weights", "--load_from", "--lora"])
def test_what_a_flag_names_and_is_not_there_is_told_before_the_page_opens(
    out: Path, tmp_path: Path, flag: str
) -> None:
    weights = [] if flag != "--lora" else ["--weights", out / "demo" / "rl_32.pth"]
    done = subprocess.run(
        [sys.executable, ROOT / "fast_inference.py", *weights, flag, tmp_path / "nope"],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 1 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'nope'} ")


def test_models_are_chosen_and_one_that_changed_is_loaded_again(
    open_page: Open, tmp_path: Path
) -> None:
    write_chat_weights(tmp_path / "demo" / "rl_32.pth", seed=1)
    write_chat_weights(tmp_path / "demo" / "multi_chat" / "full_sft_32.pth", seed=2)
    (tmp_path / "demo" / "rl_32_broken.pth").write_bytes(b"no weights")
    page = open_page(out_dir=tmp_path)
    assert page.selectbox(key="local_model").options == ["rl_32", "rl_32_broken", "full_sft_32"]
    texts = [ask(page, "你好").reply.text]
    page.selectbox(key="local_model").select_index(2).run()
    click(page, "refresh")
    assert last(page).reply.model == "full_sft_32"
    texts.append(last(page).reply.text)
    write_chat_weights(tmp_path / "demo" / "multi_chat" / "full_sft_32.pth", seed=3)
    click(page, "refresh")
    texts.append(last(page).reply.text)
    assert len(set(texts)) == 3
    page.selectbox(key="local_model").select_index(1).run()
    assert any("rl_32_broken" in error.value.replace("\\", "") for error in page.error)
    assert page.chat_input[0].disabled and texts[2] in shown(page)


def test_a_server_answers_and_its_errors_are_shown(open_page: Open) -> None:
    with tiny_server() as server:
        server.models = ["first", "second"]
        server.replies = [says("来自服务器"), error(429, "64 requests wait"), says("又好了")]
        page = open_page("--base_url", server.url, "--api_key", "sk-1")
        page.selectbox(key="server_model").select("second").run()
        assert ask(page, "你好").reply.text == "来自服务器"
        assert server.requests[0]["model"] == "second" and server.keys == ["Bearer sk-1"]
        ask(page, "再来")
        assert any(ZH["error_queue_full"] in error.value for error in page.error)
        click(page, "refresh")
        assert [reply.text for reply in last(page).replies] == ["又好了"]
    page.text_input(key="base_url").set_value(f"http://127.0.0.1:{free_port()}/v1").run()
    assert any(ZH["error_server_away"] in error.value for error in page.error)
    page.segmented_control(key="source").set_value("local").run()
    assert not page.error and ask(page, "本机").reply.model == "rl_32"


def record_headers(server: TinyServer) -> list[dict[str, str]]:
    """Return the headers of the requests that will have come, of every kind."""
    seen: list[dict[str, str]] = []

    class Recorder(server.http.RequestHandlerClass):
        def parse_request(self) -> bool:
            is_good = super().parse_request()
            seen.append({name.lower(): value for name, value in self.headers.items()})
            return is_good

    server.http.RequestHandlerClass = Recorder
    return seen


def test_the_configured_key_is_told_to_the_configured_server_only(
    open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("API_KEY", "ORG_ID", "PROJECT_ID", "ADMIN_KEY"):
        monkeypatch.setenv(f"OPENAI_{name}", f"secret-{name}")
    custom = "X-Gate: secret-gate\nAuthorization: Bearer secret-custom"
    with tiny_server() as own, tiny_server() as other:
        at_own, at_other = record_headers(own), record_headers(other)
        own.replies = other.replies = [says("ok")]
        page = open_page("--base_url", own.url)
        ask(page, "你好")
        assert {headers["authorization"] for headers in at_own} == {"Bearer secret-API_KEY"}
        field = page.text_input(key="api_key")
        assert field.value == "" and field.placeholder == ZH["api_key_placeholder"]

        monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", custom)
        for address in (other.url, f"{own.url}/../v1", other.url):
            page.text_input(key="base_url").set_value(address).run()
            assert page.text_input(key="api_key").placeholder == ""
        ask(page, "你好")
        page.text_input(key="api_key").set_value("mine").run()
        ask(page, "你好")
        page.text_input(key="base_url").set_value(f"{own.url}/").run()  # the configured one again
        ask(page, "你好")
        assert "mine" not in str(at_own), "a key goes where it was typed for"
        assert {h["authorization"] for h in at_other} == {"Bearer none", "Bearer mine"}
        assert len(at_other) >= 4 and "secret" not in str(at_other)
        drawn = [element.proto for part in (page.main, page.sidebar) for element in part]
        assert len(drawn) > 20 and "secret" not in str(drawn)


def test_without_a_configured_server_no_key_is_taken(
    open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with tiny_server() as other:
        seen = record_headers(other)
        page = open_page()
        page.segmented_control(key="source").set_value("server").run()
        assert page.text_input(key="api_key").placeholder == ""
        page.text_input(key="base_url").set_value(other.url).run()
        assert {headers["authorization"] for headers in seen} == {"Bearer none"}
    page = open_page("--api_key", "secret")
    assert "--api_key needs --base_url" in page.error[0].value


def test_a_full_queue_is_told(open_page: Open) -> None:
    page = open_page()
    source = page.session_state["source_now"]
    assert isinstance(source, LocalModel)
    engine = source.thread.engine
    before, engine.max_queue = engine.max_queue, -engine.max_batch  # free slots do not help
    try:
        ask(page, "你好")
        assert any(ZH["error_queue_full"] in error.value for error in page.error)
    finally:
        engine.max_queue = before
    click(page, "refresh")
    assert last(page).reply.text and not page.error


def test_an_answer_under_way_goes_on_while_the_page_is_drawn_again(open_page: Open) -> None:
    page = open_page()
    chat: Chat = chats(page).current
    reply = chat.ask("你好")
    source = page.session_state["source_now"]
    source.start(chat.messages(0), {"temperature": 0.0, "max_new_tokens": 60}, reply)
    page.run()  # as if another widget had been clicked
    assert reply.finish_reason == "length" and reply.n_tokens == 60
    assert reply.text.strip() in [markdown.value for markdown in page.markdown]


def test_wrong_flags_are_shown(open_page: Open) -> None:
    page = open_page("--history_cnt", 3)
    assert "--history_cnt 3 is odd" in page.error[0].value
    page = open_page("--no_such_flag")
    assert "--no_such_flag" in page.error[0].value


def test_each_turn_of_a_page_is_drawn_once(open_page: Open) -> None:
    page = open_page()
    chat, n_drawn = chats(page).current, []
    for n_turns in (20, 40, 60):
        while len(chat.turns) < n_turns:
            reply = chat.ask(f"q{len(chat.turns)}")
            reply.text, reply.finish_reason = "```python\nx\n", "stop"
        page.run()
        assert not page.exception
        assert sum(m.value == "```python\nx\n```" for m in page.markdown) == n_turns
        n_drawn.append(sum(1 for _ in page.main))
    assert n_drawn[2] - n_drawn[1] == n_drawn[1] - n_drawn[0] <= 20 * 20


def test_an_image_of_an_answer_is_shown_as_a_link_and_kept(open_page: Open) -> None:
    page = open_page()
    reply = chats(page).current.ask("q")
    reply.text, reply.finish_reason = "a ![b](http://x/y.png)", "stop"
    page.run()
    assert "a [b](http://x/y.png)" in [markdown.value for markdown in page.markdown]
    assert reply.text == "a ![b](http://x/y.png)"
