"""The Prefect flows. Importing one imports Prefect, which takes seconds."""
