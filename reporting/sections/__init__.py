"""The sections of the report: each takes the `ReportContext`, gives a list of parts."""
