"""JMLR (Joint Medical LLM and Retrieval Training, arXiv 2402.17887) for TPUs, in JAX.

Dimension letters, used as name suffixes (``score_BxK``) and in einsum strings:

B questions in a step      K candidate passages       M passages sampled for judging
N passages read            Q query tokens             P passage tokens (retriever)
L passage tokens (reader)  S question tokens          A answer tokens
T prompt tokens            C token-vector width       D hidden width      V vocabulary
"""
