"""The look of pages and plots: one style, charts, tables and templates for every report.

It knows only numbers and text: no SAE, no index. Start at `style`: palette and plot sizes.
"""
