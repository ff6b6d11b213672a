#include "scratch.h"

#include <algorithm>
#include <array>
#include <new>

namespace fuse {
namespace {

constexpr std::align_val_t kAlignment{64};

struct Piece {
    float* memory = nullptr;
    std::size_t count = 0;
};

// Pieces that nobody uses. A kernel has up to five at a time.
class Shelf {
public:
    ~Shelf() {
        for (const Piece& piece : pieces_) ::operator delete(piece.memory, kAlignment);
    }

    // The smallest that is large enough, unless most of it would lie idle.
    Piece take(std::size_t count) {
        Piece* best = nullptr;
        for (Piece& piece : pieces_) {
            const bool fits = piece.count >= count && piece.count / 2 <= count;
            if (fits && (!best || piece.count < best->count)) best = &piece;
        }
        if (!best) return {};
        const Piece found = *best;
        *best = {};
        kept_ -= found.count;
        return found;
    }

    // Whether there was a place for it; smaller pieces make way.
    bool put(const Piece& piece) {
        Piece& slot = *std::min_element(pieces_.begin(), pieces_.end(), [](auto& a, auto& b) {
            return a.count < b.count;
        });
        if (slot.count >= piece.count) return false;
        if (kept_ - slot.count + piece.count > Scratch::kKept) return false;
        ::operator delete(slot.memory, kAlignment);
        kept_ += piece.count - slot.count;
        slot = piece;
        return true;
    }

private:
    std::array<Piece, 8> pieces_{};
    std::size_t kept_ = 0;
};

Shelf& shelf() {
    thread_local Shelf own;
    return own;
}

Piece obtain(std::size_t count) {
    const Piece found = shelf().take(count);
    if (found.memory) return found;
    return {static_cast<float*>(::operator new(count * sizeof(float), kAlignment)), count};
}

}  // namespace

Scratch::Scratch(std::ptrdiff_t count) {
    const Piece piece = obtain(static_cast<std::size_t>(std::max<std::ptrdiff_t>(count, 1)));
    memory_ = {piece.memory, Give{piece.count}};
}

void Scratch::Give::operator()(float* memory) const noexcept {
    if (!shelf().put({memory, count})) ::operator delete(memory, kAlignment);
}

}  // namespace fuse
