"""The backends: one package each, one file a kernel. `lowbit.dispatch` imports them when they are first needed."""
