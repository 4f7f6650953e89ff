"""Pin the worker's device before anything imports torch, then load the plugin."""

import os

from fixtures.devices import pin

pin(os.environ)

pytest_plugins = ["fixtures.plugin", "pytester"]
