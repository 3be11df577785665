"""The package's logger. Misses, evictions and cleanups are logged at DEBUG; nothing is printed unless an application configures logging."""

import logging

LOGGER = logging.getLogger("longattn.bufmgr")
LOGGER.addHandler(logging.NullHandler())
logging.getLogger("longattn").addHandler(logging.NullHandler())
