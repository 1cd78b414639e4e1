"""Job processes: how NVFlare's process starts those of jobs, and a word at the site when one dies.

Knows NVFlare's launchers (NVFlare 2.9, utils/job_launcher_utils.py, private/fed/client/client_executor.py). Knows
nothing of connections. NVFlare joins the words of a command by spaces and takes it apart at them again: a kit, or a
Python, in a folder with a space in its name could never run a job, though its engine looks healthy.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_ABORTED = "_abort_requested"  # NVFlare's mark of a job that is told to end


def install(died: Callable[[str], object]) -> None:
    """Takes the place of the launchers' command lines, and watches how a site's jobs end.

    `died` is told in a sentence, by a thread, that a process of a job died.
    """
    from nvflare.apis.fl_constant import FLContextKey
    from nvflare.apis.job_launcher_spec import JobProcessArgs
    from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
    from nvflare.app_common.job_launcher.server_process_launcher import ServerProcessJobLauncher
    from nvflare.private.fed.client.client_executor import JobExecutor
    from nvflare.utils.job_launcher_utils import get_client_job_args, get_server_job_args

    def command_by(names: Iterable[str]) -> Callable[[Any, Any, Any], str]:
        def get_command(_launcher: Any, _job_meta: Any, fl_ctx: Any) -> str:
            prepared = fl_ctx.get_prop(FLContextKey.JOB_PROCESS_ARGS)
            return command(prepared, names, lists=[JobProcessArgs.OPTIONS])

        return get_command

    ClientProcessJobLauncher.get_command = command_by(get_client_job_args())
    ServerProcessJobLauncher.get_command = command_by(get_server_job_args())
    waits = JobExecutor._wait_child_process_finish

    def wait(executor: Any, client: Any, job_id: str, *others: Any) -> None:
        job = executor.run_processes.get(job_id, {})
        says = how_it_ended(job, job_id)
        if says is not None:
            died(says)
        waits(executor, client, job_id, *others)

    JobExecutor._wait_child_process_finish = wait


def command(arguments: Mapping[str, tuple[str, Any]], names: Iterable[str], *, lists: Iterable[str] = ()) -> str:
    """A job's command line, which `shlex.split` takes apart as it was meant.

    Of NVFlare's `arguments` (name → option and value) it has those of these names, in their order; the values of
    `lists` are several words.
    """
    words = [sys.executable]
    for name in names:
        if arguments.get(name):
            option, value = arguments[name]
            words += [option, *(str(value).split() if name in lists else [str(value)])]
    return shlex.join(words)


def how_it_ended(job: Mapping[str, Any], job_id: str) -> str | None:
    """Waits for a job's process; a sentence if it died by itself, None if it came to its end or was told to."""
    from nvflare.apis.fl_constant import RunProcessKey
    from nvflare.apis.job_launcher_spec import JobReturnCode
    from nvflare.private.fed.client.client_status import ClientStatus

    handle = job.get(RunProcessKey.JOB_HANDLE)
    if handle is None:
        return None
    handle.wait()
    over = job.get(_ABORTED) or job.get(RunProcessKey.STATUS) == ClientStatus.STOPPED
    if over or handle.poll() != JobReturnCode.EXECUTION_ERROR:
        return None
    return f"the process of job {job_id[:8]} died: this site is out of that job"
