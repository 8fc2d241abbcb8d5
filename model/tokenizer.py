"""The tokenizer of a folder and v1's chat text, with special tokens made by the template alone."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2  # <unk> (also padding), <s>, </s>: fixed by v1's files
DEFAULT_TOKENIZER = Path(__file__).parent / "minimind_tokenizer"
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
ROLES = ("system", "user", "assistant")

Message = dict[str, str]  # {"role": one of ROLES, "content": text}


class Tokenizer:
    """A byte-level BPE whose ids 0, 1, 2 come only from the chat template, never from a text.

    A text that spells ``</s>`` is encoded letter by letter, so that data and requests cannot forge
    the end of a turn. ``transformers`` loads the same folder with ``AutoTokenizer``.

    Raises:
        FileNotFoundError: no ``tokenizer.json`` in the folder.
        ValueError: the file is not a tokenizer, or its special tokens do not have v1's ids.
    """

    def __init__(self, folder: str | Path = DEFAULT_TOKENIZER) -> None:
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: make a tokenizer with train_tokenizer.py, "
                "or name its folder with --tokenizer"
            )
        try:
            self._bpe = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises a bare Exception for any malformed file
            raise ValueError(f"{path} is not a tokenizer file: {error}") from error
        ids = tuple(self._bpe.token_to_id(token) for token in SPECIAL_TOKENS)
        if ids != (UNK_ID, BOS_ID, EOS_ID):
            raise ValueError(
                f"{path}: the ids of {SPECIAL_TOKENS} are {ids}, expected (0, 1, 2); "
                "train a tokenizer with train_tokenizer.py"
            )
        if not isinstance(self._bpe.model, tokenizers.models.BPE):
            kind = type(self._bpe.model).__name__
            raise ValueError(f"{path} is of the kind {kind}, expected BPE: use train_tokenizer.py")
        known = self._bpe.get_vocab().values()
        if sorted(known) != list(range(len(known))):
            raise ValueError(
                f"{path}: its {len(known)} ids are not 0 … {len(known) - 1}, each once, as rows of "
                "an embedding are; train a tokenizer with train_tokenizer.py"
            )
        # the file can say to cut every text, or to fill it up to any length
        self._bpe.no_truncation()
        self._bpe.no_padding()
        self._bpe.encode_special_tokens = True  # special tokens inside a text are text
        self._newline = self.encode("\n")
        self._headers = {role: self.encode(f"{role}\n") for role in ROLES}

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._bpe.get_vocab_size()

    @cached_property
    def sha256(self) -> str:
        """Hash of what decides the ids (vocabulary, merges, pre-tokenizer), not of the file's
        layout.
        """
        spec = json.loads(self._bpe.to_str())
        merges = [m if isinstance(m, list) else m.split(" ") for m in spec["model"]["merges"]]
        decisive = [spec["model"]["vocab"], merges, spec["normalizer"], spec["pre_tokenizer"]]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id spells: (vocab_size,) int64, 0 for the special tokens."""
        tokens = (self._bpe.id_to_token(i) for i in range(self.vocab_size))
        # byte-level BPE writes each byte as one character of its alphabet
        return np.array([0 if t in SPECIAL_TOKENS else len(t) for t in tokens], np.int64)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` without beginning or end tokens."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; runs on all cores (``RAYON_NUM_THREADS`` limits them)."""
        return [e.ids for e in self._bpe.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; bytes that do not form a character become U+FFFD."""
        return self._bpe.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def encode_document(self, text: str) -> list[int]:
        """Return ``<s>`` text ``</s>``, a document of pretraining."""
        return [BOS_ID, *self.encode(text), EOS_ID]

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> list[int]:
        """Return the ids of v1's chat text, see :meth:`encode_chat_masked`."""
        ids = self.encode_chat_masked(messages)[0]
        if add_generation_prompt:
            ids += [BOS_ID, *self._headers["assistant"]]
        return ids

    def encode_chat_masked(
        self, messages: Sequence[Message], contents: Sequence[list[int]] | None = None
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation and which of them the assistant says.

        The text is v1's: a system text as it is, then ``<s>user\\n…</s>\\n`` and
        ``<s>assistant\\n…</s>\\n``. The mask is true on every assistant content and its ``</s>``.
        ``contents`` are the messages' encoded contents where they are at hand from a batch.

        Raises:
            ValueError: a role that is none of ``system user assistant``, or a system text that is
                not first.
        """
        ids: list[int] = []
        mask: list[bool] = []

        def add(piece: list[int], trained: bool = False) -> None:
            ids.extend(piece)
            mask.extend([trained] * len(piece))

        for index, message in enumerate(messages):
            role = message["role"]
            content = self.encode(message["content"]) if contents is None else contents[index]
            if role == "system":
                if index:
                    raise ValueError(
                        f"messages[{index}].role is 'system': a system text stands first"
                    )
                add(content)
                continue
            if role not in ROLES:
                raise ValueError(
                    f'messages[{index}].role is {role!r}: use "system", "user" or "assistant"'
                )
            add([BOS_ID, *self._headers[role]])
            add([*content, EOS_ID], trained=role == "assistant")
            add(self._newline)
        return ids, mask
