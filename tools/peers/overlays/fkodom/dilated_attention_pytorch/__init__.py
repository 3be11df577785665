"""fkodom's package with its attention replaced."""

import os

__path__.append(os.path.join(os.environ["LONGATTN_PEER"], "dilated_attention_pytorch"))
