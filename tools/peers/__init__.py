"""Other libraries' own tests, run on our attention: `nox -s peers -- FOLDER`.

An overlay has one of their modules, in our terms, and takes all others from their checkout, which `LONGATTN_PEER` names. None of their code is here.
"""
