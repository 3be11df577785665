"""What the pages under docs/ are made of besides text: the repository's own Markdown files, figures of patterns, tables and plots of benchmark rows."""
