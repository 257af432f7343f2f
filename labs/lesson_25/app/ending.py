"""The end of the service: on a signal, without losing a request, with exit status 0.

The service is a parent process and its workers. From the parent a pipe leads to the workers.
Nothing is ever sent through it: when the parent closes it, the workers end. The steps:

1. An end signal arrives: at the parent alone (docker stop), at all processes at once (Ctrl-C), or
   at one after the other (systemd). All of them block it. Only a thread of the parent takes it.
2. This thread wakes granian's main loop, which calls Server.shutdown (serve.py). That closes the
   pipe.
3. A thread of each worker sees that the pipe is closed. From now on every answer of this worker
   also closes its connection.
4. The same thread calls granian's function that ends a worker. granian finishes the requests that
   the worker has begun. Then the worker ends.
5. The parent waits for its workers, kills those that are too slow, and ends with status 0.

If the parent is killed, the system closes the pipe: steps 3 and 4 follow.

Why not as granian 2.8.7 does it? There, every process acts on the signal by itself. A worker that
ends before the parent has heard its own signal counts as crashed, and the status is 1. And its
handlers for signals can hang for ever: see call_at_end_signal.
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
    """Steps 1 and 2: call this function when an end signal arrives, in a thread of its own.

    Why not in a handler for the signal, as granian does? Python runs a handler in the main thread,
    between two lines of what that is doing. granian's handler sets an event, and needs the event's
    lock for it. The main thread may hold this lock itself just then: it waits for the same event.
    Then it waits for itself for ever. Another thread only waits until the lock is free.
    """
    signals_to_take = set(END_SIGNALS)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup has started this process
        signals_to_take.remove(signal.SIGHUP)  # it stays blocked, and nobody takes it

    def wait_for_end_signal():
        signal.sigwait(signals_to_take)
        function()

    start_thread(wait_for_end_signal)


# --- In a worker


def end_with_parent(pipe_reader, pipe_writer):
    """Have this worker do steps 3 and 4 when its parent closes the pipe, or is killed."""
    block_end_signals()  # a forked worker blocks them already; macOS and Python 3.14 do not fork
    # A worker gets both ends of the pipe. While any process has the writer open, the pipe counts
    # as open.
    pipe_writer.close()

    # Step 4 calls the worker's handler for SIGTERM, as a function. The signal itself is blocked
    # and never runs it. While the worker is still starting, it has no requests, and the handler is
    # end_at_once. When granian begins to serve, it replaces this handler with its own.
    signal.signal(signal.SIGTERM, end_at_once)

    def wait_for_parent():
        pipe_reader.poll(None)  # returns when the pipe is closed
        is_ending.set()  # step 3
        end_worker = signal.getsignal(signal.SIGTERM)
        end_worker(signal.SIGTERM, None)  # step 4

    start_thread(wait_for_parent)


def end_at_once(signal_number, frame):
    """End this worker now. The arguments are those of any handler for a signal."""
    os._exit(0)


def close_connection_if_ending(response):
    """Step 3: return the response. If the worker is ending, it also closes the connection.

    Otherwise a client that always has another request would keep the worker from ending.
    """
    if is_ending.is_set():
        response.headers["Connection"] = "close"
    return response
