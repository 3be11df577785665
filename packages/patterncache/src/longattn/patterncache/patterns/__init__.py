"""The patterns of this package, and their registry: importing any of them registers all."""

from longattn.patterncache.patterns import registry as registry
