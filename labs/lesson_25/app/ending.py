"""The end of the service: on a signal, without losing a request, with exit status 0.

The service is a parent process and its workers. From the parent a pipe leads to the workers.
Nothing is ever sent through it: when the parent closes it, the workers end. The steps:

1. An end signal arrives: at the parent alone (docker stop), at all processes at once (Ctrl-C), or
   at one after the other (systemd). All of them block it, so that by itself it does nothing.
2. A thread of the parent takes it (call_at_end_signal). It wakes granian's main loop, which calls
   Server.shutdown (serve.py). That closes the pipe.
3. A thread of each worker sees that the pipe is closed (end_with_parent). From now on every answer
   also closes its connection (close_connection_if_ending).
4. The same thread has granian end the worker (end_worker): granian finishes the requests that the
   worker has begun, and the worker ends.
5. In the parent granian waits for the workers, and kills those that are too slow. Then the parent
   ends with status 0.

If the parent is killed, the system closes the pipe: steps 3 and 4 follow.

This replaces what granian 2.8.7 does by itself. There, every process acts on the signal on its own.
If a worker ends before the parent has heard the signal, the parent takes it for crashed, and ends
with status 1. And granian's handlers for signals can hang for ever: see call_at_end_signal.
"""

import os
import signal
import threading

# How the service is told to end: by docker stop or systemd, by Ctrl-C, by a closed terminal.
END_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

# Set in a worker that is ending. Each worker process has one of its own.
is_ending = threading.Event()


def block_end_signals():
    """Have this thread, and all threads and processes that it starts, not act on end signals.

    The system keeps a blocked signal until a thread takes it. A process that is forked later
    blocks the same signals.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)


def start_thread(function):
    """Call a function in a thread that does not keep the process from ending."""
    threading.Thread(target=function, daemon=True).start()


# --- In the parent


def call_at_end_signal(function):
    """Step 2: call this function when an end signal arrives, in a thread of its own.

    A handler for the signal, as granian has one, can hang for ever:

    - granian's main thread waits for an event. For short moments it then holds the event's lock.
    - If the signal arrives in such a moment, Python runs the handler in the main thread, too.
    - The handler sets the event, and needs the lock for that. So the main thread waits for itself.

    Another thread that sets the event only waits until the main thread has released the lock.
    """
    signals_to_take = set(END_SIGNALS)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        # nohup has started this process. SIGHUP stays blocked, and nobody takes it: it is ignored.
        signals_to_take.remove(signal.SIGHUP)

    def wait_for_end_signal():
        signal.sigwait(signals_to_take)
        function()

    start_thread(wait_for_end_signal)


# --- In a worker


def end_with_parent(pipe_reader, pipe_writer):
    """Have this worker end, by steps 3 and 4, when its parent closes the pipe or is killed."""
    block_end_signals()  # a forked worker has inherited this, another one has not
    # A pipe counts as closed when no process has its writer open any more. Every worker has got one
    # with the pipe, and closes it here. So the parent's is the last one.
    pipe_writer.close()
    signal.signal(signal.SIGTERM, end_at_once)  # until granian sets its own: see end_worker

    def wait_for_parent():
        pipe_reader.poll(None)  # returns when the pipe is closed
        is_ending.set()
        end_worker()

    start_thread(wait_for_parent)


def end_worker():
    """Step 4: end this worker by calling its handler for SIGTERM.

    When granian begins to serve, it sets such a handler: it finishes the requests, then the worker
    ends. Before that the handler is end_at_once, because a worker that is still starting has no
    requests. SIGTERM itself is blocked. So the handler never runs by itself, and is called here.
    """
    handler = signal.getsignal(signal.SIGTERM)
    handler(signal.SIGTERM, None)


def end_at_once(signal_number, frame):
    """End this process. (This has the arguments of a handler for a signal.)"""
    os._exit(0)


def close_connection_if_ending(response):
    """Step 3: return the response. If the worker is ending, it also closes the connection.

    Otherwise a client that always has another request would keep the worker from ending.
    """
    if is_ending.is_set():
        response.headers["Connection"] = "close"
    return response
