"""The package's logger. DEBUG tells of misses, evictions and cleanups; nothing is printed unless an application asks."""

import logging

LOGGER = logging.getLogger("longattn.bufmgr")
LOGGER.addHandler(logging.NullHandler())
logging.getLogger("longattn").addHandler(logging.NullHandler())
