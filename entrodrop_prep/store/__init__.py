"""What is on disk: schemas, digests, shards, manifests, and directories of them."""
