/* A program in C that feeds frames to FuseEngine through shared memory: a made-up thermal camera, a
 * warm spot that circles over a cold wall, 640x512 counts of 16 bits, 30 times a second.
 *
 *     cc -O2 -I"$(python -c 'import fuseengine.video as v; print(v.include_dir())')" \
 *         examples/thermal_camera.c -o thermal_camera -lm -lrt
 *     ./thermal_camera thermal 300 &
 *     fuseengine video --infrared shm://thermal --visible ... --agc percentile -o fused.mp4
 *
 * A real camera's driver fills the picture where this one draws. */
#include "fuse_shm.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { WIDTH = 640, HEIGHT = 512, RATE = 30, SLOTS = 4 };

static void draw(uint16_t* picture, unsigned frame) {
    const double angle = 0.05 * frame;
    const double x0 = WIDTH * (0.5 + 0.3 * cos(angle)), y0 = HEIGHT * (0.5 + 0.3 * sin(angle));
    for (int y = 0; y < HEIGHT; ++y) {
        for (int x = 0; x < WIDTH; ++x) {
            const double dx = (x - x0) / 30.0, dy = (y - y0) / 30.0;
            const double warm = 900.0 * exp(-dx * dx - dy * dy);
            picture[y * WIDTH + x] = (uint16_t)(22000.0 + warm + (double)(rand() % 16));
        }
    }
}

int main(int argc, char** argv) {
    const char* name = argc > 1 ? argv[1] : "thermal";
    const unsigned frames = argc > 2 ? (unsigned)strtoul(argv[2], NULL, 10) : 0; /* 0: for ever */
    fuse_shm ring;
    if (fuse_shm_create(&ring, name, WIDTH, HEIGHT, FUSE_SHM_GRAY16, 0, SLOTS) != 0) {
        perror(name);
        return 1;
    }
    uint64_t due = fuse_shm_now();
    for (unsigned frame = 0; frames == 0 || frame < frames; ++frame) {
        draw((uint16_t*)fuse_shm_begin(&ring), frame); /* straight into the ring: no copy */
        fuse_shm_publish(&ring, fuse_shm_now());
        due += 1000000000u / RATE;
        const uint64_t now = fuse_shm_now();
        if (now < due) {
            const struct timespec rest = {0, (long)(due - now)};
            nanosleep(&rest, NULL);
        }
    }
    fuse_shm_close(&ring); /* readers see the end of the stream */
    return 0;
}
