"""Candidate retrieval: exact MaxSim, ScaNN over fixed-dimensional encodings, BM25, the index directory, tables."""
