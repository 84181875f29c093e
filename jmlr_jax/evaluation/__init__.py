"""How well arms answer and retrieve: measurements, statistics, report and figures."""
