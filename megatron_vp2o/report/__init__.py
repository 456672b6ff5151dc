"""The report of finished or running runs: one page with tables and charts."""
