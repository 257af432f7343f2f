"""The limits that the tests and the benchmark hold the project to, each with its reason.

A ratio is the image's figure divided by that of the single-stage image, measured in the same run.
"""

# The image

# Unpacked; the packages and their bytecode are 37 MB, which leaves no room for a build tool.
LAYERS_OVER_BASE_BYTES = 38_000_000
# What leaving the build tools and the caches behind has to bring.
LAYERS_OVER_BASE_RATIO = 1 / 10
# Compressed, as each new machine pulls it; 46 MB of it are the base image.
WHOLE_IMAGE_BYTES = 57_000_000
WHOLE_IMAGE_RATIO = 1 / 3
# A changed app.py installs no package again.
REBUILD_SECONDS = 1
# Unpacked, in blocks of 4 kB: the app's files alone.
CHANGED_APP_BYTES = 100_000
# Nor does it push one again: the app and the configuration of the image are about 10 kB.
PUSHED_AGAIN_BYTES = 50_000

# Start and stop

# `up -d --wait`, images present: each health check passes soon after its service can answer.
UP_SECONDS = 3
# Idle; a server that does not hear SIGTERM is killed after ten.
STOP_SECONDS = 1

# Speed

# By the published port, where the engine's proxy is a part of the time.
THROUGHPUT_RATIO = 4
# At the container's own address: the single stage gains too, and runs this very app.
THROUGHPUT_DIRECT_RATIO = 3
# With few requests at a time, the slowest take at most half as long as with the development server.
P99_RATIO = 1 / 2

# Answers while something is wrong

# Whoever asks while an outage is known, or beside slow clients.
AT_ONCE_SECONDS = 0.1
# The request that meets a frozen Redis first: the app gives up after half a second, and a probe
# mostly has one second.
FIRST_WAIT_SECONDS = 0.9
# The default: as many requests may wait in an outage, since each worker notices it by itself.
WORKERS = 2
# A kept connection without a request: load balancers keep theirs for 60.
KEPT_OPEN_SECONDS = 65
# Until hits are counted again once Redis is back, or has moved.
BACK_WITHIN_SECONDS = 2

# For what has to happen, in tests that measure no time: a busy machine must not fail them.
PATIENCE_SECONDS = 30

# Memory and processes

# Of the web container, after load too; two workers have about 60 MiB then.
IDLE_MEMORY_BYTES = 80 * 2**20
# With 4,000 idle connections; they took 91 MiB.
IDLE_CONNECTIONS = 4_000
IDLE_CONNECTIONS_MEMORY_BYTES = 128 * 2**20
# After an outage, to the memory before it: waiting requests must not pile up.
MEMORY_GROWTH_RATIO = 1.15
# The Compose files' own, as the engine sets them.
MEMORY_LIMITS_BYTES = {"web": 512 * 2**20, "redis": 128 * 2**20}
PROCESS_LIMITS = {"web": 512, "redis": 64}

# Several machines

# From the command to its end, which is when the new version has held; 46 on a quiet machine.
DEPLOY_SECONDS = 60
