"""The limits that the tests and the benchmark hold the project to, each with its reason.

A ratio is this lesson's figure divided by that of the single-stage image, measured in the same run.
"""

# The image

LAYERS_OVER_BASE_BYTES = (
    36_000_000  # unpacked; the packages alone are 34 MB, which leaves no room for a build tool
)
LAYERS_OVER_BASE_RATIO = 1 / 10  # what leaving the build tools and the caches behind has to bring
WHOLE_IMAGE_BYTES = (
    56_000_000  # compressed, as each new machine pulls it; 46 MB of it are the base image
)
WHOLE_IMAGE_RATIO = 1 / 3
REBUILD_SECONDS = 1  # a changed app.py installs no package again
PUSHED_AGAIN_BYTES = (
    50_000  # nor does it push one again: the app and the configuration of the image are about 10 kB
)

# Start and stop

UP_SECONDS = (
    3  # `up -d --wait`, images present: each health check passes soon after its service can answer
)
STOP_SECONDS = 1  # idle; a server that does not hear SIGTERM is killed after ten

# Speed

THROUGHPUT_RATIO = 4  # by the published port, where the engine's proxy is a part of the time
THROUGHPUT_DIRECT_RATIO = (
    3  # at the container's own address: the single stage gains too, and runs this very app
)
P99_RATIO = 1  # with few requests at a time, none may take longer than with the development server

# Answers while something is wrong

AT_ONCE_SECONDS = 0.1  # whoever asks while an outage is known, or beside slow clients
FIRST_WAIT_SECONDS = (
    1.5  # the request that meets a frozen Redis first; the app gives up after one second
)
WORKERS = 2  # the default: as many requests may wait in an outage, because each worker has to notice it by itself
BACK_WITHIN_SECONDS = 2  # until hits are counted again once Redis is back, or has moved

PATIENCE_SECONDS = (
    10  # for what has to happen, in tests that measure no time: a busy machine must not fail them
)

# Memory and processes

IDLE_MEMORY_BYTES = (
    80 * 2**20
)  # of the web container, after load too; two workers have about 60 MiB then
MEMORY_GROWTH_RATIO = (
    1.15  # after an outage, to the memory before it: waiting requests must not pile up
)
MEMORY_LIMITS_BYTES = {
    "web": 256 * 2**20,
    "redis": 128 * 2**20,
}  # the Compose files' own, as the engine sets them
PROCESS_LIMITS = {"web": 128, "redis": 64}
