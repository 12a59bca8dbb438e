"""The `deat-rb` commands that a page shows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

SEPARATORS = {"&&", "||", ";", "|", "&", ">", ">>", "2>&1"}


def commands_of(text: str) -> Iterator[list[str]]:
    """Yield the arguments of each `deat-rb ...` in the text's code blocks and in its inline code."""
    blocks = re.findall(r"^```(?:bash|console|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [code for code in re.findall(r"`([^`\n]+)`", prose) if code.startswith("deat-rb ")]
    for line in lines:
        if "deat-rb " not in line and "-m deat_rb " not in line:
            continue
        words = shlex.split(line.replace(";", " ; "), comments=True)
        starts = [i + 1 for i, word in enumerate(words) if word == "deat-rb" or word.endswith("/deat-rb")]
        starts += [i + 2 for i, word in enumerate(words[:-1]) if word == "-m" and words[i + 1] == "deat_rb"]
        for start in starts:
            arguments = []
            for word in words[start:]:
                if word in SEPARATORS:
                    break
                arguments.append(word)
            if arguments and "..." not in arguments and arguments != ["-m"]:
                yield arguments
