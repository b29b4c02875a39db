// Tiles of grouped rows, and in which order they are taken.
#pragma once

struct Place {
    int row;
    int column;
};

// The index-th of row_tiles x column_tiles tiles. Blocks that run at the same time should share rows and
// columns in the second-level cache, so tiles are counted in panels: down PANEL rows, then along the columns.
__device__ __forceinline__ Place place_in_panels(int index, int row_tiles, int column_tiles) {
    constexpr int PANEL = 16;
    const int panel = index / (PANEL * column_tiles), within = index - panel * PANEL * column_tiles;
    const int height = max(1, min(PANEL, row_tiles - panel * PANEL));
    return {panel * PANEL + within % height, within / height};
}

struct Tile {
    int group;   // num_groups stands for the rows behind the last group, which get zeros
    int first;   // first row of the tile
    int count;   // rows of the tile, at most ROWS; 0: there is no such tile
    int column;  // which tile along the columns
};
