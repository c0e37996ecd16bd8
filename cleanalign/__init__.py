"""The mechanism under cleanalign's scripts: models, data, decoding, runs. It knows no algorithm; the root
folder shows those."""
