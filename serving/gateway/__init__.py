"""The online front: REST and gRPC on one service. Never imports tensorflow, keras, prefect or dvc."""
