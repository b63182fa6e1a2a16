"""Batch scoring: a folder of pictures or an array file of any size in, one row for each out.

A job is cut into shards, each scored by itself and written as a part file by an atomic rename; so a job that was killed
goes on where it was, and shards may run anywhere that sees the files. Nothing here knows Prefect: flows/score.py does.
"""
