"""When things run: ingest, release, schedule, publish. Reaches serving only over the network and as processes."""
