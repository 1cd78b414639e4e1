"""Loads folders, one after the other, as a user would in the working directory of whoever made them.

Reads JSON lines of cases, prints a JSON line of what became of each. Standard input is closed by the caller; no
connection is made, and each case has so much time and memory.
"""

import json
import os
import sys

os.environ.pop("HF_HUB_OFFLINE", None)

import resource
import socket
from pathlib import Path

import transformers
from bounded import address_space, within
from corpus.chains import MARKER

import llmchain_fed
from llmchain_fed import LLMChain, LocalChatModel, LocalLLM, LocalModel

CALLS = {
    "chain": LLMChain.load,
    "model": LocalModel.from_pretrained,
    "llm": LocalLLM.from_pretrained,
    "chat": LocalChatModel.from_pretrained,
}
opened, asked = [], []


def watch(event, details):
    if event == "open" and isinstance(details[0], str):
        opened.append(details[0])
    elif event in ("socket.connect", "socket.getaddrinfo", "builtins.input"):
        asked.append(event)
        msg = f"{event} is refused here"
        raise OSError(msg)


def outcome(case):
    os.chdir(case["cwd"])
    os.environ[MARKER] = case["marker"]
    for name in [n for n in sys.modules if n.partition(".")[0] in ("megatron", "chainfolder")]:
        del sys.modules[name]
    opened.clear()
    asked.clear()
    limit = address_space() + 1536 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        with within(case.get("seconds", 20)):
            found = CALLS[case["call"]](case["folder"])
    except llmchain_fed.LLMChainFedError as error:
        told = {"error": type(error).__name__, "message": str(error)}
    except BaseException as error:
        told = {"error": f"untyped {type(error).__name__}", "message": str(error)[:500]}
    else:
        told = {"error": None, "message": type(found).__name__}
        if case.get("ask") is not None:
            told["answer"] = found.invoke(case["ask"])
    here = str(Path(case["cwd"]))
    return told | {
        "ran": Path(case["marker"]).exists(),
        "asked": list(asked),
        "opened": [p for p in opened if os.path.abspath(p).startswith(here)],
    }


def main():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    socket.setdefaulttimeout(1)
    sys.path.insert(0, "")  # as in a notebook or `python -c`
    sys.addaudithook(watch)
    for line in Path(sys.argv[1]).read_text().splitlines():
        case = json.loads(line)
        print(json.dumps(outcome(case)), flush=True)


if __name__ == "__main__":
    main()
