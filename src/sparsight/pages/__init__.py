"""How pages and plots look: one style, charts, tables and templates for every report.

It knows numbers and text alone: no SAE, no index. Start at `style`: palette and plot sizes.
"""
