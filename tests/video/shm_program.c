/* What test_shared_memory.py compiles: "write NAME COUNT" and "read NAME". */
#include "fuse_shm.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

static int write_frames(const char* name, unsigned count) {
    fuse_shm ring;
    const struct timespec pause = {0, 2000000};
    if (fuse_shm_create(&ring, name, 7, 5, FUSE_SHM_GRAY16, 0, 64) != 0) {
        perror(name);
        return 1;
    }
    while (getchar() != EOF) continue; /* until somebody reads */
    for (unsigned k = 0; k < count; ++k) {
        uint16_t* picture = (uint16_t*)fuse_shm_begin(&ring);
        for (unsigned i = 0; i < 35; ++i) picture[i] = (uint16_t)(1000 * k + i);
        fuse_shm_publish(&ring, fuse_shm_now());
        nanosleep(&pause, NULL);
    }
    fuse_shm_close(&ring);
    return 0;
}

static int read_frame(const char* name) {
    fuse_shm ring;
    uint64_t capture_ns, sum = 0;
    uint16_t picture[35];
    if (fuse_shm_open(&ring, name) != 0 || ring.frame_bytes != sizeof picture) {
        perror(name);
        return 1;
    }
    if (!fuse_shm_wait(&ring, 0, 1000000000u) || !fuse_shm_read(&ring, 0, picture, &capture_ns)) {
        fputs("no frame\n", stderr);
        return 1;
    }
    for (unsigned i = 0; i < 35; ++i) sum += picture[i];
    printf("%" PRIu32 " %" PRIu32 " %" PRIu32 " %" PRIu64 " %" PRIu64 "\n", ring.width, ring.height,
           ring.format, capture_ns, sum);
    fuse_shm_close(&ring);
    return 0;
}

int main(int argc, char** argv) {
    if (argc == 4 && strcmp(argv[1], "write") == 0) {
        return write_frames(argv[2], (unsigned)strtoul(argv[3], NULL, 10));
    }
    return argc == 3 ? read_frame(argv[2]) : 2;
}
