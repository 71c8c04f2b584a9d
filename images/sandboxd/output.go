package main

// bounded keeps head and tail of a stream in constant memory; the middle is counted and dropped on arrival.
type bounded struct {
	headSize, tailSize int
	head, tail         []byte
	total              int64
}

func newBounded(limit int) *bounded {
	return &bounded{headSize: limit / 2, tailSize: limit - limit/2}
}

func (b *bounded) Write(data []byte) (int, error) {
	length := len(data)
	b.total += int64(length)
	if room := b.headSize - len(b.head); room > 0 {
		if room > len(data) {
			room = len(data)
		}
		b.head = append(b.head, data[:room]...)
		data = data[room:]
	}
	b.tail = append(b.tail, data...)
	if len(b.tail) > 2*b.tailSize+65536 {
		b.tail = append(b.tail[:0], b.tail[len(b.tail)-b.tailSize:]...)
	}
	return length, nil
}

// parts returns what was kept of the beginning and of the end, and how many bytes between them were dropped.
func (b *bounded) parts() (head, tail []byte, dropped int64) {
	tail = b.tail
	if len(tail) > b.tailSize {
		tail = tail[len(tail)-b.tailSize:]
	}
	return b.head, tail, b.total - int64(len(b.head)+len(tail))
}
