"""Pure tensor arithmetic: number formats, packing, groups, rotations. Knows no weight format, file or device."""
