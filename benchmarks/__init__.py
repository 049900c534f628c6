"""Measurements that README and docs quote. Run through `python run.py bench`."""
