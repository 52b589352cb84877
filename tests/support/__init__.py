"""Helpers that several tests share: whole runs, faulty servers, hosts, a Slurm cluster, a browser, groups of ranks,
references.

Tests import from here and never from each other. Pytest puts the repository's root on the path (``pythonpath`` in
``pyproject.toml``), so that ``tests.support`` is importable without any edit of ``sys.path``.
"""
